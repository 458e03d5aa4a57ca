//! A TCP proxy that makes faults on purpose: cuts, refusals, delays, half-open and truncated connections.
//!
//! Invariant: what it forwards is forwarded unchanged and in order; a fault holds for every connection until it is taken back.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What happens to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// New connections are closed at once.
    Refuse,
    /// Connections stay open, and nothing comes through.
    HalfOpen,
    /// Every piece is held for a while.
    Delay(Duration),
    /// The connection is closed after so many bytes from the server.
    CutAfter(u64),
}

/// The proxy; ends when it is dropped.
pub struct Proxy {
    port: u16,
    fault: watch::Sender<Fault>,
    epoch: Arc<watch::Sender<u64>>,
    accepting: AbortHandle,
}

impl Proxy {
    /// Forwards a port of its own to `target`, both on the loopback interface.
    pub async fn to(target: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let (fault, faults) = watch::channel(Fault::None);
        let epoch = Arc::new(watch::channel(0).0);
        let cuts = Arc::clone(&epoch);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, target, faults.clone(), cuts.subscribe()));
            }
        });
        Self { port, fault, epoch, accepting: accepting.abort_handle() }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on this happens.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        self.epoch.send_modify(|epoch| *epoch += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn forward(client: TcpStream, target: u16, fault: watch::Receiver<Fault>, mut cuts: watch::Receiver<u64>) {
    if *fault.borrow() == Fault::Refuse {
        return;
    }
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = pump(from_client, to_server, fault.clone(), false) => (),
        () = pump(from_server, to_client, fault, true) => (),
        _ = cuts.changed() => (),
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut fault: watch::Receiver<Fault>, is_answer: bool) {
    let (mut buffer, mut sent) = (vec![0; 16 * 1024], 0_u64);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let now = *fault.borrow_and_update();
        let mut count = count;
        match now {
            Fault::None | Fault::Refuse => (),
            Fault::Delay(time) => tokio::time::sleep(time).await,
            Fault::HalfOpen => {
                if fault.wait_for(|fault| *fault != Fault::HalfOpen).await.is_err() {
                    return;
                }
            }
            Fault::CutAfter(bytes) if is_answer => count = count.min(bytes.saturating_sub(sent) as usize),
            Fault::CutAfter(_) => (),
        }
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        sent += count as u64;
    }
}
