//! A TCP proxy that cuts connections, or lets them hang, on command.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards to one address until told to cut.
pub struct Proxy {
    pub address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    cut: watch::Sender<u64>,
    silent: watch::Sender<bool>,
    refusing: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, silent) = (watch::Sender::new(0), watch::Sender::new(false));
        let refusing = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicUsize::new(0));
        let target = Arc::new(Mutex::new(target));
        let task = tokio::spawn({
            let target = target.clone();
            let (cut, silent) = (cut.clone(), silent.clone());
            let (refusing, accepted) = (refusing.clone(), accepted.clone());
            async move {
                loop {
                    let Ok((inbound, _)) = listener.accept().await else { return };
                    if refusing.load(Ordering::Acquire) {
                        continue;
                    }
                    accepted.fetch_add(1, Ordering::AcqRel);
                    let mut cuts = cut.subscribe();
                    let silent = silent.subscribe();
                    let target = *target.lock().unwrap();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = forward(inbound, target, silent) => {}
                            _ = cuts.changed() => {}
                        }
                    });
                }
            }
        });
        Self { address, target, cut, silent, refusing, accepted, task }
    }

    /// Where connections go from now on.
    pub fn aim(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }

    /// Cuts every connection in the middle of whatever it carries.
    pub fn cut(&self) {
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts, and takes no new connection until [`Proxy::heal`].
    pub fn go_dark(&self) {
        self.refusing.store(true, Ordering::Release);
        self.cut();
    }

    /// Keeps connections and takes new ones, but carries nothing until [`Proxy::heal`]: a process that is stopped.
    pub fn go_silent(&self) {
        self.silent.send_replace(true);
    }

    pub fn heal(&self) {
        self.refusing.store(false, Ordering::Release);
        self.silent.send_replace(false);
    }

    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Acquire)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
    }
}

async fn forward(inbound: TcpStream, target: SocketAddr, silent: watch::Receiver<bool>) {
    let Ok(outbound) = TcpStream::connect(target).await else { return };
    // Either may be gone already.
    let _ = (inbound.set_nodelay(true), outbound.set_nodelay(true));
    let (from_client, to_client) = inbound.into_split();
    let (from_broker, to_broker) = outbound.into_split();
    tokio::join!(pump(from_client, to_broker, silent.clone()), pump(from_broker, to_client, silent));
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut silent: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if silent.wait_for(|silent| !silent).await.is_err() || to.write_all(&buffer[..bytes]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
