//! Listings, page by page, and the error documents of servers.
//!
//! Invariant: one odd key costs nothing but itself; memory is bounded by a page.

use http::Method;
use http::header::HeaderMap;
use quick_xml::Reader;
use quick_xml::events::Event;

use super::client::ObjectClient;
use super::error::ObjectError;

/// Bytes of a listing page at most; a thousand keys of the longest kind fit well into it.
const PAGE_BYTES: usize = 16 << 20;

/// An object in a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// Key, as it is.
    pub key: String,
    /// Whether that is so: a key that is not UTF-8 is shown as the server encodes it, and cannot be asked for.
    pub is_exact: bool,
    /// Bytes.
    pub size: u64,
    /// Entity tag, without quotes.
    pub etag: Option<String>,
    /// When it was last written, as the server says: RFC 3339.
    pub last_modified: Option<String>,
}

/// A page of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Objects in the order of their keys.
    pub objects: Vec<Listed>,
    /// Where the next page begins; absent on the last.
    pub next: Option<String>,
}

impl ObjectClient {
    /// One page of the objects below `prefix`, a thousand at most.
    pub async fn list(&self, bucket: &str, prefix: &str, from: Option<&str>) -> Result<Page, ObjectError> {
        let place = self.place(bucket, prefix);
        // Keys may hold what XML cannot: they come percent-encoded.
        let mut query = vec![("list-type", "2"), ("encoding-type", "url"), ("prefix", prefix)];
        query.extend(from.map(|token| ("continuation-token", token)));
        let answer = self.send(Method::GET, (bucket, ""), &query, HeaderMap::new(), Vec::new()).await?;
        let unavailable = |reason: String| ObjectError::Unavailable { place: place.clone(), reason };
        let body = self.bounded(&place, answer.into_body().bytes()).await?;
        let body = body.map_err(|error| unavailable(error.to_string()))?;
        let unreadable = |reason: &str| ObjectError::Unreadable { place: place.clone(), reason: reason.to_owned() };
        if body.len() > PAGE_BYTES {
            return Err(unreadable("the page is too long"));
        }
        let text = std::str::from_utf8(&body).map_err(|_| unreadable("not UTF-8"))?;
        page(text).map_err(|reason| unreadable(&reason))
    }
}

/// Reads a `ListBucketResult`.
fn page(xml: &str) -> Result<Page, String> {
    let (mut page, mut object, mut encoded) = (Page::default(), None::<Listed>, false);
    walk(xml, |path, text| match (path, &mut object) {
        ([.., "Contents"], _) if text.is_none() => page.objects.extend(object.take()),
        ([.., "Contents", field], slot) => {
            let object = slot.get_or_insert_default();
            let text = text.unwrap_or_default();
            match *field {
                "Key" => object.key = text.to_owned(),
                "Size" => object.size = text.parse().unwrap_or(0),
                "ETag" => object.etag = Some(text.trim_matches('"').to_owned()),
                "LastModified" => object.last_modified = Some(text.to_owned()),
                _ => {}
            }
        }
        ([_, "NextContinuationToken"], _) => page.next = text.map(str::to_owned),
        ([_, "EncodingType"], _) => encoded = text == Some("url"),
        _ => {}
    })?;
    for object in &mut page.objects {
        let key = if encoded { decoded(&object.key) } else { Some(object.key.clone()) };
        object.is_exact = key.is_some();
        object.key = key.unwrap_or_else(|| std::mem::take(&mut object.key));
    }
    Ok(page)
}

/// The word for programs in a server's error document.
pub(super) fn error_code(xml: &str) -> Option<String> {
    let mut code = None;
    walk(xml, |path, text| {
        if let ([.., "Code"], Some(text)) = (path, text) {
            code.get_or_insert_with(|| text.chars().filter(char::is_ascii_alphanumeric).take(64).collect());
        }
    })
    .ok()?;
    code
}

/// Names and values of an object's tags.
pub(super) fn tags(xml: &str) -> Vec<(String, String)> {
    let (mut tags, mut name) = (Vec::new(), String::new());
    let read = walk(xml, |path, text| match path {
        [.., "Tag", "Key"] => name = text.unwrap_or_default().to_owned(),
        [.., "Tag", "Value"] => tags.push((std::mem::take(&mut name), text.unwrap_or_default().to_owned())),
        _ => {}
    });
    if read.is_ok() { tags } else { Vec::new() }
}

/// Calls `leaf` with the path and text of every element that has text, and with the path alone at the end of every other.
fn walk(xml: &str, mut leaf: impl FnMut(&[&str], Option<&str>)) -> Result<(), String> {
    let mut reader = Reader::from_str(xml);
    let (mut path, mut text) = (Vec::<String>::new(), String::new());
    // What stands between elements is no text of theirs.
    let mut is_leaf = false;
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(tag) => {
                path.push(String::from_utf8_lossy(tag.local_name().as_ref()).into_owned());
                text.clear();
                is_leaf = true;
            }
            Event::Text(piece) => text.push_str(&piece.decode().map_err(|error| error.to_string())?),
            Event::GeneralRef(name) => {
                let name = name.decode().map_err(|error| error.to_string())?;
                text.push_str(&entity(&name).ok_or("an unknown entity")?);
            }
            Event::End(_) => {
                let names: Vec<&str> = path.iter().map(String::as_str).collect();
                leaf(&names, (is_leaf && !text.is_empty()).then_some(text.as_str()));
                text.clear();
                is_leaf = false;
                path.pop();
            }
            Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

fn entity(name: &str) -> Option<String> {
    if let Some(number) = name.strip_prefix('#') {
        let code = match number.strip_prefix('x') {
            Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok()?,
            None => number.parse().ok()?,
        };
        return char::from_u32(code).map(String::from);
    }
    quick_xml::escape::resolve_xml_entity(name).map(str::to_owned)
}

/// Percent-decoding; `+` is a space there, as in forms.
pub fn decoded(text: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match first {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits = std::str::from_utf8(after.get(..2)?).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &after[2..];
            }
            byte => bytes.push(*byte),
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_with_its_odd_keys() {
        let xml = "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"x\"><Name>b</Name><EncodingType>url</EncodingType>\
            <NextContinuationToken>a&amp;b=</NextContinuationToken>\
            <Contents><Key>a//b%20c%C3%BC</Key><LastModified>2024-01-02T03:04:05Z</LastModified>\
            <ETag>&quot;abc&quot;</ETag><Size>12</Size><Owner><ID>x</ID></Owner></Contents>\n\
            <Contents>\n  <Key>d</Key>\n  <Size>0</Size>\n</Contents></ListBucketResult>";
        let page = page(xml).expect("read");
        assert_eq!(page.next.as_deref(), Some("a&b="));
        assert_eq!(page.objects.len(), 2);
        let first = &page.objects[0];
        assert_eq!((first.key.as_str(), first.size, first.etag.as_deref()), ("a//b cü", 12, Some("abc")));
        assert_eq!(page.objects[1].key, "d");
        let odd = "<L><EncodingType>url</EncodingType><Contents><Key>a%FF</Key></Contents><Contents><Key>b</Key></Contents></L>";
        let odd = super::page(odd).expect("read");
        let keys: Vec<_> = odd.objects.iter().map(|object| (object.key.as_str(), object.is_exact)).collect();
        assert_eq!(keys, [("a%FF", false), ("b", true)]);
    }

    #[test]
    fn an_error_document_gives_its_code() {
        let xml = "<Error><Code>SignatureDoesNotMatch</Code><Message>x</Message></Error>";
        assert_eq!(error_code(xml).as_deref(), Some("SignatureDoesNotMatch"));
        assert_eq!(error_code("<html><b>proxy</b>"), None);
    }
}
