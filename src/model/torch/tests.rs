//! Files that PyTorch wrote (`fixtures/heads/make.py`), whole, harmful and damaged.

use std::fs;

use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/heads").join(name)
}

fn convert(from: &Path) -> Result<(Converted, Vec<u8>), ConvertError> {
    let directory = TempDir::new().expect("a temporary directory");
    let to = directory.path().join("heads.safetensors");
    let converted = convert_heads(from, &to)?;
    Ok((converted, fs::read(to).expect("written")))
}

#[track_caller]
fn refused(name: &str, part: &str) {
    let error = convert(&fixture(name)).expect_err("refused").to_string();
    assert!(error.contains(part) && error.contains(name), "'{error}' does not say '{part}'");
}

#[test]
fn heads_are_converted_with_their_values_also_where_they_are_transposed() {
    let (converted, bytes) = convert(&fixture("heads.bin")).expect("converts");
    assert_eq!(converted, Converted { tensors: 4, left_out: 1 });
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let expected = fs::read_to_string(fixture("heads.expected.txt")).expect("read");
    for line in expected.lines() {
        let (name, values) = line.split_once(' ').expect("a name and values");
        let values: Vec<f32> = values.split(' ').map(|value| value.parse().expect("a number")).collect();
        let tensor = file.tensor(name).expect("converted");
        let got: Vec<f32> = match tensor.dtype() {
            Dtype::BF16 => tensor.data().chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => tensor.data().chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        assert_eq!(got, values, "{name}");
    }
    assert_eq!(file.tensor("model.layers.0.self_attn.fc2.weight").expect("there").shape(), [2, 6]);
}

#[test]
fn code_is_refused_by_name() {
    refused("harmful.bin", "print");
}

#[test]
fn anything_but_tensors_of_known_types_is_refused() {
    refused("double.bin", "DoubleStorage");
    refused("nested.bin", "is not a tensor");
    refused("legacy.bin", "save it anew");
    refused("make.py", "zip archive");
    refused("absent.bin", "No such file");
}

#[test]
fn views_outside_of_their_storage_are_refused() {
    let view = |offset, shape: &[usize], strides: &[usize]| {
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        rows(&TensorRef { element: Element::F16, storage: "0".into(), offset, shape, strides }, &[0; 16])
    };
    assert_eq!(view(0, &[2, 4], &[4, 1]).map(|bytes| bytes.len()), Some(16));
    for (offset, shape, strides) in [
        (1, [2, 4], [4, 1]),
        (0, [2, 4], [5, 1]),
        (0, [2, 4], [usize::MAX, 1]),
        (0, [1 << 40, 1], [0, 0]),
        (usize::MAX, [1, 1], [1, 1]),
    ] {
        assert_eq!(view(offset, &shape, &strides), None, "{offset} {shape:?} {strides:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_damaged_file_is_an_error_or_converts_but_never_panics(at in 0_usize..6000, byte: u8, cut in 0_usize..6000, shorten: bool) {
        thread_local!(static WHOLE: Vec<u8> = fs::read(fixture("heads.bin")).expect("read"));
        let mut bytes = WHOLE.with(Clone::clone);
        let at = at % bytes.len();
        bytes[at] = byte;
        if shorten {
            bytes.truncate(cut % bytes.len());
        }
        let directory = TempDir::new().expect("a temporary directory");
        let from = directory.path().join("damaged.bin");
        fs::write(&from, bytes).expect("written");
        let _ = convert_heads(&from, &directory.path().join("out"));
    }

    #[test]
    fn any_program_ends(program in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = machine::run(&program);
    }
}
