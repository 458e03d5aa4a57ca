//! The requests: head, read a range, write, copy, tag, delete.
//!
//! Invariant: an answer is checked against what was asked for before anything of it is used.

use std::ops::Range;

use futures_util::StreamExt;
use http::Method;
use http::header::{CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE};
use object_store::client::HttpResponse;
use quick_xml::escape::escape;

use super::client::{ObjectClient, encode, sentence};
use super::error::ObjectError;
use super::listing::{error_code, tags};

const VERSION_ID: HeaderName = HeaderName::from_static("x-amz-version-id");
const COPY_IF_MATCH: HeaderName = HeaderName::from_static("x-amz-copy-source-if-match");
const COPY_SOURCE: HeaderName = HeaderName::from_static("x-amz-copy-source");

/// Bytes of an object, the end not included.
pub type ByteRange = Range<u64>;

/// What to read.
#[derive(Debug, Clone, Copy, Default)]
pub struct GetRequest<'a> {
    /// Bucket.
    pub bucket: &'a str,
    /// Key, as it is.
    pub key: &'a str,
    /// This version.
    pub version_id: Option<&'a str>,
    /// Only if the object has this entity tag.
    pub etag: Option<&'a str>,
}

/// What a server says of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// Bytes in all.
    pub size: u64,
    /// Entity tag, as the server writes it.
    pub etag: Option<String>,
    /// Version.
    pub version_id: Option<String>,
    /// Content type.
    pub content_type: Option<String>,
}

/// A part of an object.
#[derive(Debug)]
pub struct Got {
    /// Of the whole object.
    pub head: Head,
    /// The bytes that came; fewer than asked for if the connection broke, which `broken` then says.
    pub bytes: Vec<u8>,
    /// Why not all came.
    pub broken: Option<ObjectError>,
}

impl ObjectClient {
    /// Reads `range` of an object; a range that reaches beyond the end is cut there. What came before a connection broke is kept, so that
    /// the caller can go on from there.
    pub async fn get(&self, request: GetRequest<'_>, range: ByteRange) -> Result<Got, ObjectError> {
        let place = self.place(request.bucket, request.key);
        let answer = match self.ask(request, &range).await {
            // An empty object has no byte that a range could begin at.
            Err(ObjectError::Refused { status: 416, .. }) if range.start == 0 => return self.empty(request).await,
            answer => answer?,
        };
        let head = self.head_of(&place, &answer)?;
        // Not every server minds the condition.
        let is_other = |asked: &str| head.etag.as_deref().is_some_and(|got| quoted(got) != quoted(asked));
        if request.etag.is_some_and(is_other) {
            return Err(ObjectError::Changed { place });
        }
        if answer.headers().get(CONTENT_RANGE).is_some_and(|got| !begins_at(got, range.start)) {
            return Err(ObjectError::Unreadable { place, reason: "it is another range than was asked for".to_owned() });
        }
        let wanted = (range.end.min(head.size)).saturating_sub(range.start);
        self.body(&place, answer, head, wanted).await
    }

    /// Whether the server itself refuses a read whose condition does not hold.
    pub(super) async fn refuses(&self, request: GetRequest<'_>) -> Result<bool, ObjectError> {
        match self.ask(request, &(0..1)).await {
            Ok(_) => Ok(false),
            Err(ObjectError::Changed { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, request: GetRequest<'_>, range: &ByteRange) -> Result<HttpResponse, ObjectError> {
        let place = self.place(request.bucket, request.key);
        let mut headers = HeaderMap::new();
        let last = range.end.saturating_sub(1);
        headers.insert(RANGE, self.header(&place, &format!("bytes={}-{last}", range.start))?);
        if let Some(etag) = request.etag {
            headers.insert(IF_MATCH, self.header(&place, &quoted(etag))?);
        }
        let version: Vec<_> = request.version_id.map(|id| ("versionId", id)).into_iter().collect();
        self.send(Method::GET, (request.bucket, request.key), &version, headers, Vec::new()).await
    }

    /// Asks what an object is, without reading it.
    pub async fn head(&self, request: GetRequest<'_>) -> Result<Head, ObjectError> {
        let place = self.place(request.bucket, request.key);
        let version: Vec<_> = request.version_id.map(|id| ("versionId", id)).into_iter().collect();
        let at = (request.bucket, request.key);
        let answer = self.send(Method::HEAD, at, &version, HeaderMap::new(), Vec::new()).await?;
        self.head_of(&place, &answer)
    }

    /// Writes a whole object.
    pub async fn put(&self, bucket: &str, key: &str, content_type: &str, body: Vec<u8>) -> Result<(), ObjectError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, self.header(&self.place(bucket, key), content_type)?);
        self.send(Method::PUT, (bucket, key), &[], headers, body).await.map(|_| ())
    }

    /// Copies an object within its bucket, if it has this entity tag.
    pub async fn copy(&self, bucket: &str, from: &str, to: &str, etag: Option<&str>) -> Result<(), ObjectError> {
        let mut source = format!("/{bucket}/");
        encode(from, true, &mut source);
        let mut headers = HeaderMap::new();
        let place = self.place(bucket, to);
        headers.insert(COPY_SOURCE, self.header(&place, &source)?);
        if let Some(etag) = etag {
            headers.insert(COPY_IF_MATCH, self.header(&place, &quoted(etag))?);
        }
        let answer = self.send(Method::PUT, (bucket, to), &[], headers, Vec::new()).await?;
        // A copy may fail after the head of the answer, which then says that it did not.
        match error_code(&self.text(&place, answer).await?) {
            None => Ok(()),
            Some(code) => Err(ObjectError::Unavailable { place, reason: format!("the copy failed ({code})") }),
        }
    }

    /// Names and values of an object's tags.
    pub async fn tags(&self, bucket: &str, key: &str) -> Result<Vec<(String, String)>, ObjectError> {
        let answer = self.send(Method::GET, (bucket, key), &[("tagging", "")], HeaderMap::new(), Vec::new()).await?;
        Ok(tags(&self.text(&self.place(bucket, key), answer).await?))
    }

    /// Gives an object a tag; its others stay.
    pub async fn tag(&self, bucket: &str, key: &str, name: &str, value: &str) -> Result<(), ObjectError> {
        let mut all = self.tags(bucket, key).await?;
        all.retain(|(other, _)| other != name);
        all.push((name.to_owned(), value.to_owned()));
        let mut body = "<Tagging><TagSet>".to_owned();
        for (name, value) in &all {
            body += &format!("<Tag><Key>{}</Key><Value>{}</Value></Tag>", escape(name), escape(value));
        }
        body += "</TagSet></Tagging>";
        self.send(Method::PUT, (bucket, key), &[("tagging", "")], HeaderMap::new(), body.into_bytes()).await.map(|_| ())
    }

    /// Deletes an object, if it has this entity tag; that it is not there is fine. Not every server minds the tag.
    pub async fn delete(&self, bucket: &str, key: &str, etag: Option<&str>) -> Result<(), ObjectError> {
        let mut headers = HeaderMap::new();
        if let Some(etag) = etag {
            headers.insert(IF_MATCH, self.header(&self.place(bucket, key), &quoted(etag))?);
        }
        match self.send(Method::DELETE, (bucket, key), &[], headers, Vec::new()).await {
            Ok(_) | Err(ObjectError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A short answer as text.
    async fn text(&self, place: &str, answer: HttpResponse) -> Result<String, ObjectError> {
        let body = self.bounded(place, answer.into_body().bytes()).await?;
        let broken = |reason: String| ObjectError::Unavailable { place: place.to_owned(), reason };
        let body = body.map_err(|error| broken(sentence(&error)))?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn empty(&self, request: GetRequest<'_>) -> Result<Got, ObjectError> {
        let head = self.head(request).await?;
        let place = self.place(request.bucket, request.key);
        let same = request.etag.is_none_or(|etag| head.etag.as_deref().is_some_and(|now| quoted(now) == quoted(etag)));
        match head.size {
            0 if same => Ok(Got { head, bytes: Vec::new(), broken: None }),
            _ => Err(ObjectError::Changed { place }),
        }
    }

    async fn body(&self, place: &str, answer: HttpResponse, head: Head, wanted: u64) -> Result<Got, ObjectError> {
        let mut bytes = Vec::with_capacity(wanted.min(1 << 26) as usize);
        let mut stream = answer.into_body().bytes_stream();
        let broken = loop {
            let unavailable = |reason: String| ObjectError::Unavailable { place: place.to_owned(), reason };
            match self.bounded(place, stream.next()).await {
                Ok(Some(Ok(piece))) if bytes.len() as u64 + piece.len() as u64 > wanted => {
                    let reason = "more bytes came than were asked for".to_owned();
                    return Err(ObjectError::Unreadable { place: place.to_owned(), reason });
                }
                Ok(Some(Ok(piece))) => bytes.extend_from_slice(&piece),
                Ok(Some(Err(error))) => break Some(unavailable(sentence(&error))),
                Ok(None) if (bytes.len() as u64) < wanted => {
                    break Some(unavailable(format!("the answer ends after {} of {wanted} bytes", bytes.len())));
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        Ok(Got { head, bytes, broken })
    }

    fn head_of(&self, place: &str, answer: &HttpResponse) -> Result<Head, ObjectError> {
        let text =
            |name: HeaderName| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        // `bytes 0-9/120` of a part, the length itself of a whole.
        let size = match text(CONTENT_RANGE) {
            Some(range) => range.rsplit_once('/').and_then(|(_, size)| size.parse().ok()),
            None => text(http::header::CONTENT_LENGTH).and_then(|size| size.parse().ok()),
        };
        let reason = || "it does not say how long the object is".to_owned();
        let size = size.ok_or_else(|| ObjectError::Unreadable { place: place.to_owned(), reason: reason() })?;
        Ok(Head { size, etag: text(ETAG), version_id: text(VERSION_ID), content_type: text(CONTENT_TYPE) })
    }

    fn header(&self, place: &str, value: &str) -> Result<HeaderValue, ObjectError> {
        HeaderValue::from_str(value)
            .map_err(|error| ObjectError::Unreadable { place: place.to_owned(), reason: error.to_string() })
    }
}

/// Whether `bytes 100-199/1000` begins there.
fn begins_at(range: &HeaderValue, start: u64) -> bool {
    let text = range.to_str().ok().and_then(|text| text.strip_prefix("bytes "));
    text.and_then(|text| text.split('-').next()).and_then(|first| first.parse().ok()) == Some(start)
}

/// Entity tags are opaque, and quoted on the wire; listings and people leave the quotes out.
pub(super) fn quoted(etag: &str) -> String {
    if etag.starts_with('"') || etag.starts_with("W/") || etag == "*" { etag.to_owned() } else { format!("\"{etag}\"") }
}
