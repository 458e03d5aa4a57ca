//! A client of one store: where it is, who we are there, and signed requests to it.
//!
//! Invariant: the only place where a request is signed and sent.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderMap;
use http::{Method, Request};
use object_store::ClientOptions;
use object_store::aws::{AmazonS3Builder, AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{HttpClient, HttpConnector, HttpResponse, ReqwestConnector};

use super::error::ObjectError;

/// Error documents of servers are short; more of one is not read.
const ERROR_BYTES: usize = 16 * 1024;

/// How a store is reached.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Name in URIs.
    pub alias: String,
    /// `https://host[:port]`; absent: AWS, by region.
    pub endpoint: Option<String>,
    /// Region, for signatures.
    pub region: String,
    /// Who we are there.
    pub credentials: Credentials,
    /// Allow `http://` endpoints.
    pub allow_http: bool,
    /// Time for the answer's head, and between two pieces of its body.
    pub silence_at_most: Duration,
}

/// Where the key comes from.
#[derive(Clone)]
pub enum Credentials {
    /// A fixed key.
    Key { id: String, secret: String },
    /// The environment, a web identity token, or the instance's metadata service, as AWS's own tools look for them.
    Ambient,
    /// None: public objects.
    Anonymous,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key { .. } => "Key",
            Self::Ambient => "Ambient",
            Self::Anonymous => "Anonymous",
        })
    }
}

/// A client of one store; cheap to clone.
#[derive(Clone)]
pub struct ObjectClient {
    options: Arc<StoreOptions>,
    credentials: Option<AwsCredentialProvider>,
    http: HttpClient,
}

impl ObjectClient {
    /// Makes a client; nothing is sent yet.
    pub fn new(options: StoreOptions) -> Result<Self, ObjectError> {
        let place = options.alias.clone();
        let unusable =
            |error: object_store::Error| ObjectError::Credentials { place: place.clone(), reason: error.to_string() };
        // The builder finds credentials as AWS's tools do; the bucket does not matter for that.
        let builder = match &options.credentials {
            Credentials::Anonymous => None,
            Credentials::Key { id, secret } => {
                Some(AmazonS3Builder::new().with_access_key_id(id).with_secret_access_key(secret))
            }
            Credentials::Ambient => Some(AmazonS3Builder::from_env()),
        };
        let credentials = match builder {
            Some(builder) => {
                let client = ClientOptions::new().with_allow_http(true);
                let store = builder.with_region(&options.region).with_bucket_name("any").with_client_options(client);
                Some(Arc::clone(store.build().map_err(unusable)?.credentials()))
            }
            None => None,
        };
        let client = ClientOptions::new()
            .with_allow_http(options.allow_http)
            .with_connect_timeout(options.silence_at_most)
            // The whole of a long body may take long; silence is bounded per read instead.
            .with_timeout_disabled();
        let http = ReqwestConnector::default().connect(&client).map_err(unusable)?;
        Ok(Self { options: Arc::new(options), credentials, http })
    }

    /// Name in URIs.
    pub fn alias(&self) -> &str {
        &self.options.alias
    }

    /// Longest silence that is borne.
    pub fn silence_at_most(&self) -> Duration {
        self.options.silence_at_most
    }

    /// `s3://alias/bucket/key`, for messages.
    pub(super) fn place(&self, bucket: &str, key: &str) -> String {
        format!("s3://{}/{bucket}/{key}", self.options.alias)
    }

    /// Sends a request and returns the answer's head with its unread body; an error status is an error.
    pub(super) async fn send(
        &self,
        method: Method,
        (bucket, key): (&str, &str),
        query: &[(&str, &str)],
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<HttpResponse, ObjectError> {
        let place = self.place(bucket, key);
        let url = self.url(bucket, key, query);
        let unreadable = |reason: String| ObjectError::Unreadable { place: place.clone(), reason };
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .body(body.into())
            .map_err(|error| unreadable(error.to_string()))?;
        *request.headers_mut() = headers;
        if let Some(provider) = &self.credentials {
            let refused = |error: object_store::Error| ObjectError::Credentials {
                place: place.clone(),
                reason: error.to_string(),
            };
            let finding = self.bounded(&place, provider.get_credential());
            let credential = finding.await?.map_err(refused)?;
            let authorizer = AwsAuthorizer::new(&credential, "s3", &self.options.region);
            authorizer.try_authorize(&mut request, None).map_err(refused)?;
        }
        let answer = self.bounded(&place, self.http.execute(request)).await?;
        let broken = |reason: String| ObjectError::Unavailable { place: place.clone(), reason };
        let answer = answer.map_err(|error| broken(sentence(&error)))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let text = self.bounded(&place, answer.into_body().bytes()).await?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text[..text.len().min(ERROR_BYTES)]).into_owned();
        let code = super::listing::error_code(&text).unwrap_or_else(|| "no reason given".to_owned());
        Err(ObjectError::of_status(place, status.as_u16(), code))
    }

    /// Waits for something of the server, but not for ever.
    pub(super) async fn bounded<T>(&self, place: &str, wait: impl Future<Output = T>) -> Result<T, ObjectError> {
        let bound = self.options.silence_at_most;
        let timed_out = |_| ObjectError::TimedOut { place: place.to_owned(), bound };
        tokio::time::timeout(bound, wait).await.map_err(timed_out)
    }

    fn url(&self, bucket: &str, key: &str, query: &[(&str, &str)]) -> String {
        let mut url = match &self.options.endpoint {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => format!("https://s3.{}.amazonaws.com", self.options.region),
        };
        url.push('/');
        url.push_str(bucket);
        // Without a key the bucket itself is meant.
        if !key.is_empty() {
            url.push('/');
            encode(key, true, &mut url);
        }
        for (index, (name, value)) in query.iter().enumerate() {
            url.push(if index == 0 { '?' } else { '&' });
            url.push_str(name);
            url.push('=');
            encode(value, false, &mut url);
        }
        url
    }
}

/// Percent-encoding as signatures want it: everything but unreserved characters, and `/` in paths.
pub(super) fn encode(text: &str, is_path: bool, out: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b'/' if is_path => out.push('/'),
            byte if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
}

/// An error with what is behind it; the outer text alone often says nothing.
pub(super) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sent_as_they_are() {
        let mut url = String::new();
        encode("a//b c/ü?#%+.txt", true, &mut url);
        assert_eq!(url, "a//b%20c/%C3%BC%3F%23%25%2B.txt");
    }
}
