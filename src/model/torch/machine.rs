//! The pickle machine, as far as a dictionary of tensors needs it.
//!
//! A pickle is a program for a small stack machine, whose GLOBAL and REDUCE instructions can call any Python function. This machine calls
//! nothing: it knows a handful of names, and knows what tensor or container each of them stands for; every other name is refused.
//!
//! Invariant: time and memory are bounded by the length of the program; containers can not be used twice, so nothing grows by repetition.

use std::collections::HashMap;
use std::rc::Rc;

/// Names that PyTorch writes for tensors.
const TENSOR: &str = "torch._utils._rebuild_tensor_v2";
const PARAMETER: &str = "torch._utils._rebuild_parameter";
const ORDERED_DICT: &str = "collections.OrderedDict";

/// Element type of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    F16,
    Bf16,
}

impl Element {
    fn of_storage(name: &str) -> Option<Self> {
        match name {
            "torch.FloatStorage" => Some(Self::F32),
            "torch.HalfStorage" => Some(Self::F16),
            "torch.BFloat16Storage" => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A tensor as a view of a storage; sizes in elements, not yet checked against the storage's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorRef {
    pub element: Element,
    /// Name of the storage's entry in the archive.
    pub storage: Rc<str>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Value {
    None,
    Bool,
    Int(i64),
    Text(Rc<str>),
    Tuple(Rc<[Value]>),
    Global(Rc<str>),
    Storage(Element, Rc<str>),
    Tensor(Rc<TensorRef>),
    Dict(Vec<(Value, Value)>),
    Mark,
    /// What the memo has of a container: it may be stored, but not fetched.
    Container,
}

/// Runs a program and gives the tensors of the dictionary it makes, in its order.
pub(super) fn run(program: &[u8]) -> Result<Vec<(String, TensorRef)>, String> {
    let mut machine = Machine { program, at: 0, stack: Vec::new(), memo: HashMap::new() };
    let Value::Dict(items) = machine.run()? else {
        return Err("its content is not a dictionary of tensors".to_owned());
    };
    items.into_iter().map(named_tensor).collect()
}

fn named_tensor(item: (Value, Value)) -> Result<(String, TensorRef), String> {
    match item {
        (Value::Text(name), Value::Tensor(tensor)) => Ok((name.to_string(), (*tensor).clone())),
        (Value::Text(name), _) => Err(format!("'{name}' is not a tensor")),
        _ => Err("a key of its dictionary is not a string".to_owned()),
    }
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let opcode = self.bytes(1)?[0];
            match opcode {
                b'.' => return self.pop(),
                0x80 => self.protocol()?,
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.stack.push(Value::Global(format!("{module}.{name}").into()));
                }
                0x93 => self.stack_global()?,
                b'R' => self.reduce()?,
                b'Q' => self.persistent()?,
                b'b' => self.build()?,
                b'q' => {
                    let key = self.bytes(1)?[0].into();
                    self.remember(key)?;
                }
                b'r' => {
                    let key = self.u32()?;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let key = self.bytes(1)?[0].into();
                    self.recall(key)?;
                }
                b'j' => {
                    let key = self.u32()?;
                    self.recall(key)?;
                }
                b'u' | b's' => self.set_items(opcode == b'u')?,
                0x95 => drop(self.bytes(8)?),
                _ => {
                    let value = self.plain(opcode)?;
                    self.stack.push(value);
                }
            }
        }
    }

    /// Opcodes that push a value made of nothing but their argument or what lies on the stack.
    fn plain(&mut self, opcode: u8) -> Result<Value, String> {
        Ok(match opcode {
            b'(' => Value::Mark,
            b'N' => Value::None,
            0x88 | 0x89 => Value::Bool,
            b'K' => Value::Int(self.bytes(1)?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => self.long()?,
            b'X' => {
                let length = self.u32()? as usize;
                self.text(length)?
            }
            0x8c => {
                let length = self.bytes(1)?[0].into();
                self.text(length)?
            }
            b'}' => Value::Dict(Vec::new()),
            b')' => Value::Tuple(Rc::new([])),
            0x85..=0x87 => {
                let items = usize::from(opcode - 0x84);
                let first = self.stack.len().checked_sub(items).ok_or("it takes from an empty stack")?;
                Value::Tuple(self.stack.drain(first..).collect())
            }
            b't' => Value::Tuple(self.since_mark()?.into()),
            other => {
                return Err(format!(
                    "its pickle has the instruction {other:#04x}, which no dictionary of tensors needs"
                ));
            }
        })
    }

    fn protocol(&mut self) -> Result<(), String> {
        match self.bytes(1)?[0] {
            2..=5 => Ok(()),
            other => Err(format!("its pickle has protocol {other}; 2 to 5 are known")),
        }
    }

    fn stack_global(&mut self) -> Result<(), String> {
        match (self.pop()?, self.pop()?) {
            (Value::Text(name), Value::Text(module)) => {
                self.stack.push(Value::Global(format!("{module}.{name}").into()));
                Ok(())
            }
            _ => Err("a name in its pickle is not a string".to_owned()),
        }
    }

    /// A call in Python; here, what the known names stand for.
    fn reduce(&mut self) -> Result<(), String> {
        let (Value::Tuple(arguments), Value::Global(name)) = (self.pop()?, self.pop()?) else {
            return Err("its pickle calls something that has no name".to_owned());
        };
        let value = match (&*name, &*arguments) {
            (ORDERED_DICT, []) => Value::Dict(Vec::new()),
            (TENSOR, arguments) => Value::Tensor(Rc::new(tensor(arguments)?)),
            (PARAMETER, [tensor @ Value::Tensor(_), ..]) => tensor.clone(),
            _ => return Err(format!("its pickle would call {name}, which is refused: only tensors are read")),
        };
        self.stack.push(value);
        Ok(())
    }

    /// `('storage', type, key, device, elements)`.
    fn persistent(&mut self) -> Result<(), String> {
        let Value::Tuple(id) = self.pop()? else { return Err("a storage of its pickle has no name".to_owned()) };
        let [Value::Text(kind), Value::Global(storage), Value::Text(key), ..] = &*id else {
            return Err("a storage of its pickle is not named as PyTorch does".to_owned());
        };
        match (&**kind, Element::of_storage(storage)) {
            ("storage", Some(element)) => {
                self.stack.push(Value::Storage(element, Rc::clone(key)));
                Ok(())
            }
            _ => Err(format!("it has a tensor of {storage}; float, half and bfloat16 are read")),
        }
    }

    /// State of a container, such as the `_metadata` of a state dictionary: of no use here.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err("its pickle sets the state of something that is no dictionary".to_owned()),
        }
    }

    fn set_items(&mut self, many: bool) -> Result<(), String> {
        let items = match many {
            true => self.since_mark()?,
            false => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
        };
        let Some(Value::Dict(dict)) = self.stack.last_mut() else {
            return Err("its pickle sets items of something that is no dictionary".to_owned());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            dict.push((key, value));
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let value = match self.stack.last().ok_or("it remembers the top of an empty stack")? {
            Value::Dict(_) => Value::Container,
            value => value.clone(),
        };
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        match self.memo.get(&key) {
            Some(Value::Container) => Err("its pickle uses a dictionary twice".to_owned()),
            Some(value) => {
                self.stack.push(value.clone());
                Ok(())
            }
            None => Err(format!("its pickle recalls {key}, which it has not remembered")),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or("a mark is missing")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| "it takes from an empty stack".to_owned())
    }

    fn long(&mut self) -> Result<Value, String> {
        let length = usize::from(self.bytes(1)?[0]);
        let bytes = self.bytes(length)?;
        if length > 8 {
            return Err("a number in its pickle is too large".to_owned());
        }
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..length].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, length: usize) -> Result<Value, String> {
        let bytes = self.bytes(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a string in its pickle is not UTF-8")?;
        Ok(Value::Text(text.into()))
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.program[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or("its pickle is cut short")?;
        self.at += end + 1;
        String::from_utf8(rest[..end].to_vec()).map_err(|_| "a name in its pickle is not UTF-8".to_owned())
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn bytes(&mut self, count: usize) -> Result<&[u8], String> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.program.len());
        let end = end.ok_or("its pickle is cut short")?;
        let bytes = &self.program[self.at..end];
        self.at = end;
        Ok(bytes)
    }
}

/// `(storage, offset, shape, strides, …)`.
fn tensor(arguments: &[Value]) -> Result<TensorRef, String> {
    let [Value::Storage(element, storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..] =
        arguments
    else {
        return Err("a tensor of its pickle is not described as PyTorch does".to_owned());
    };
    let size = |value: &Value| match value {
        Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a tensor of its pickle has the size {n}")),
        _ => Err("a size in its pickle is not a number".to_owned()),
    };
    let sizes = |values: &[Value]| values.iter().map(size).collect::<Result<Vec<_>, _>>();
    let (shape, strides) = (sizes(shape)?, sizes(strides)?);
    if shape.len() != strides.len() || shape.len() > 2 {
        return Err(format!("a tensor of its pickle has {} dimensions and {} strides", shape.len(), strides.len()));
    }
    Ok(TensorRef {
        element: *element,
        storage: Rc::clone(storage),
        offset: size(&Value::Int(*offset))?,
        shape,
        strides,
    })
}
