//! What a store can do, found out by asking: servers that speak the protocol differ in it.
//!
//! Invariant: nothing is written.

use super::client::ObjectClient;
use super::error::ObjectError;
use super::request::GetRequest;

/// What a store can do for a prefix that can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Objects in the first page of the listing.
    pub listed: usize,
    /// Whether listings have entity tags.
    pub has_etags: bool,
    /// What reading showed; absent if there was nothing to read.
    pub reading: Option<Reading>,
}

/// How objects are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// A condition on the entity tag holds; otherwise answers are compared, and documents of several ranges still never mixed.
    pub has_conditions: bool,
    /// Versions are kept.
    pub has_versions: bool,
}

impl Probe {
    /// In words.
    pub fn summary(&self) -> String {
        let etags = if self.has_etags {
            "with entity tags"
        } else {
            "WITHOUT entity tags: overwriting is seen by time and size"
        };
        let reading = match self.reading {
            None => "no object there to try reading with".to_owned(),
            Some(reading) => format!(
                "can be read, conditional GET {}, versions {}",
                if reading.has_conditions { "works" } else { "is IGNORED by the server" },
                if reading.has_versions { "kept" } else { "not kept" }
            ),
        };
        format!("can be listed {etags}; {reading}")
    }
}

impl ObjectClient {
    /// Lists a page below `prefix`, and reads a byte of an object there with the right and with a wrong entity tag.
    pub async fn probe(&self, bucket: &str, prefix: &str) -> Result<Probe, ObjectError> {
        let page = self.list(bucket, prefix, None).await?;
        let has_etags = page.objects.iter().all(|object| object.etag.is_some());
        let readable = page.objects.iter().find(|object| object.is_exact && object.size > 0);
        let reading = match readable {
            None => None,
            Some(object) => {
                let any = GetRequest { bucket, key: &object.key, version_id: None, etag: object.etag.as_deref() };
                let got = self.get(any, 0..1).await?;
                let other = GetRequest { etag: Some("\"00000000000000000000000000000000\""), ..any };
                let has_conditions = self.refuses(other).await?;
                Some(Reading { has_conditions, has_versions: got.head.version_id.is_some() })
            }
        };
        Ok(Probe { listed: page.objects.len(), has_etags, reading })
    }
}
