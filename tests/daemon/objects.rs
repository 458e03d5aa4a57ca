//! Documents in an object store: the right bytes, or an error that says what happened.

use std::time::Duration;

use apbd::document::fetch::{DocumentSource, S3Source};
use apbd::job::{DocumentRef, DocumentUri, ErrorCode};
use apbd::objects::{Credentials, ObjectClient, ObjectError, StoreOptions};

use crate::services::proxy::{Fault, Proxy};
use crate::services::s3::{S3, shared};

const MANY: u64 = 1 << 30;

pub fn client(server: &S3, port: u16, secret: &str) -> ObjectClient {
    patient_client(server, port, secret, Duration::from_secs(2))
}

/// One that bears so much silence.
pub fn patient_client(server: &S3, port: u16, secret: &str, silence_at_most: Duration) -> ObjectClient {
    let credentials = Credentials::Key { id: server.access_key_id.clone(), secret: secret.to_owned() };
    ObjectClient::new(StoreOptions {
        alias: "main".to_owned(),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: "us-east-1".to_owned(),
        credentials,
        allow_http: true,
        silence_at_most,
    })
    .expect("a client")
}

/// A client with a bucket of its own.
async fn bucket(name: &str) -> ObjectClient {
    let server = shared();
    let client = client(server, server.port, &server.secret_access_key);
    client.put(name, "", "text/plain", Vec::new()).await.expect("a bucket");
    client
}

fn document(bucket: &str, key: &str, etag: Option<String>) -> DocumentRef {
    let uri = DocumentUri::S3 { store: "main".to_owned(), bucket: bucket.to_owned(), key: key.to_owned() };
    DocumentRef { uri, version_id: None, etag, media_type: None }
}

/// Bytes that differ everywhere, so that a range in the wrong place is seen.
fn content(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|at| ((at.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (seed << 30)) >> 29) as u8).collect()
}

#[tokio::test]
async fn odd_keys_are_read_and_listed_as_they_are() {
    let client = bucket("odd").await;
    let source = S3Source::new([client.clone()]);
    let keys = ["a//b.txt", "with space/ü漢.txt", "100%+&=?#.txt", "plain.txt"];
    for key in keys {
        client.put("odd", key, "text/plain", key.as_bytes().to_vec()).await.expect("written");
        let fetched = source.fetch(&document("odd", key, None), MANY).await.expect("read");
        assert_eq!(fetched.bytes, key.as_bytes());
    }
    let page = client.list("odd", "", None).await.expect("listed");
    let mut listed: Vec<_> = page.objects.iter().map(|object| object.key.as_str()).collect();
    let mut expected = keys;
    listed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(listed, expected);
}

#[tokio::test]
async fn a_long_object_is_read_whole_over_connections_that_break() {
    let client_direct = bucket("long").await;
    let bytes = content(20 << 20, 1);
    client_direct.put("long", "a", "text/plain", bytes.clone()).await.expect("written");
    let server = shared();
    let proxy = Proxy::to(server.port).await;
    let source = S3Source::new([client(server, proxy.port(), &server.secret_access_key)]);
    proxy.set(Fault::CutAfter(3 << 20));
    let fetched = source.fetch(&document("long", "a", None), MANY).await.expect("read in spite of it");
    assert!(fetched.bytes == bytes, "the bytes are not those of the object");
    proxy.set(Fault::HalfOpen);
    let error = source.fetch(&document("long", "a", None), MANY).await.expect_err("silence ends");
    assert_eq!(error.code(), ErrorCode::FetchTimedOut);
    proxy.set(Fault::Refuse);
    proxy.cut();
    let error = source.fetch(&document("long", "a", None), MANY).await.expect_err("refused");
    assert_eq!(error.code(), ErrorCode::FetchFailed);
}

#[tokio::test]
async fn an_object_that_is_overwritten_while_it_is_read_is_never_a_mixture() {
    let direct = bucket("changing").await;
    let (first, second) = (content(30 << 20, 1), content(30 << 20, 2));
    direct.put("changing", "a", "text/plain", first).await.expect("written");
    let server = shared();
    let proxy = Proxy::to(server.port).await;
    proxy.set(Fault::Delay(Duration::from_millis(10)));
    let source = S3Source::new([client(server, proxy.port(), &server.secret_access_key)]);
    let wanted = document("changing", "a", None);
    let (read, written) = tokio::join!(source.fetch(&wanted, MANY), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let written = direct.put("changing", "a", "text/plain", second).await;
        proxy.set(Fault::None);
        written
    });
    written.expect("written");
    assert_eq!(read.map(|fetched| fetched.bytes.len()).expect_err("it has changed").code(), ErrorCode::SourceChanged);
    let pinned = document("changing", "a", Some("\"0123456789abcdef0123456789abcdef\"".to_owned()));
    assert_eq!(source.fetch(&pinned, MANY).await.expect_err("another tag").code(), ErrorCode::SourceChanged);
}

#[tokio::test]
async fn errors_are_told_apart() {
    let direct = bucket("errors").await;
    direct.put("errors", "empty", "text/plain", Vec::new()).await.expect("written");
    direct.put("errors", "large", "text/plain", vec![b'x'; 1000]).await.expect("written");
    let source = S3Source::new([direct]);
    let code = async |key: &str, at_most| match source.fetch(&document("errors", key, None), at_most).await {
        Ok(fetched) => Ok(fetched.bytes.len()),
        Err(error) => Err(error.code()),
    };
    assert_eq!(code("gone", MANY).await, Err(ErrorCode::DocumentNotFound));
    assert_eq!(code("empty", MANY).await, Ok(0));
    assert_eq!(code("large", 1000).await, Ok(1000));
    assert_eq!(code("large", 999).await, Err(ErrorCode::DocumentTooLarge));
    let server = shared();
    let wrong = client(server, server.port, "not the secret");
    let error = wrong.list("errors", "", None).await.expect_err("the signature is checked");
    assert!(matches!(error, ObjectError::Credentials { .. } | ObjectError::Forbidden { .. }), "{error}");
    assert!(!error.to_string().contains("not the secret"));
}
