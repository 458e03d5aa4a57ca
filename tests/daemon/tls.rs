//! The broker and the database over TLS: only the one whose certificate is vouched for is spoken to.

use apbd::job::retry::RetryPolicy;
use apbd::store::{Access, Roles, migrate, open};

use crate::harness::{Site, all, succeeded, until};
use crate::services::certificates::Certificates;
use crate::services::free_port;
use crate::services::postgres::Postgres;
use crate::services::rabbitmq::RabbitMq;

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_believed_for_its_certificate_only() {
    let (made, port) = (Certificates::make(), free_port());
    let broker = RabbitMq::start(&format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\nssl_options.keyfile = {}\n\
         ssl_options.verify = verify_none",
        made.authority().display(),
        made.certificate().display(),
        made.key().display()
    ));
    // What sends the jobs and looks on does not come by TLS.
    let direct = Site::on(&broker.url());
    let publisher = direct.publisher().await;
    let over_tls = |host: &str, authority: bool| {
        let mut site = Site::on(&format!("amqps://guest:guest@{host}:{port}/%2f"));
        site.queue.clone_from(&direct.queue);
        if authority {
            site.variables.insert("APBD_AMQP_CA_FILE".to_owned(), made.authority().display().to_string());
        }
        site
    };

    // Nobody vouches for it; then it is another's certificate than that of the host which was asked for.
    for (host, authority) in [("localhost", false), ("127.0.0.1", true)] {
        let site = over_tls(host, authority);
        let daemon = site.start();
        let store = site.store().await;
        let job = site.send(&publisher, 0).await;
        until("it says what is wrong with the certificate", || async {
            daemon
                .get("/readyz")
                .is_some_and(|(status, text)| status == 503 && text.to_lowercase().contains("certificate"))
        })
        .await;
        assert!(all(&*store).await.is_empty(), "{job} is not taken from there");
    }

    let site = over_tls("localhost", true);
    let daemon = site.start();
    daemon.ready().await;
    let (store, job) = (site.store().await, site.send(&publisher, 0).await);
    succeeded(&*store, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_believed_for_its_certificate_only() {
    let (made, mut server) = (Certificates::make(), Postgres::start());
    let plain = server.database();
    migrate(&plain.parse().expect("a URL"), &Roles::default()).await.expect("migrated");
    server.restart_with_tls(&made.certificate(), &made.key());
    let authority = made.authority().display().to_string();
    let verified = |host: &str, authority: &str| {
        format!("{}?sslmode=verify-full{authority}", plain.replace("127.0.0.1", host)).parse().expect("a URL")
    };
    let ours = format!("&sslrootcert={authority}");
    for (host, authority) in [("localhost", ""), ("127.0.0.1", ours.as_str())] {
        let refused = open(&verified(host, authority), Access::Client, RetryPolicy::default()).await;
        assert!(refused.is_err(), "{host} {authority}");
    }
    let store = open(&verified("localhost", &ours), Access::Client, RetryPolicy::default()).await.expect("opens");
    store.check().await.expect("it answers");
}
