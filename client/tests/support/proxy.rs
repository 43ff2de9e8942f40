//! A TCP proxy that cuts connections on command.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards to one address until told to cut.
pub struct Proxy {
    pub address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    cut: watch::Sender<u64>,
    refusing: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cut = watch::Sender::new(0);
        let refusing = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicUsize::new(0));
        let target = Arc::new(Mutex::new(target));
        let task = tokio::spawn({
            let target = target.clone();
            let (cut, refusing, accepted) = (cut.clone(), refusing.clone(), accepted.clone());
            async move {
                loop {
                    let Ok((inbound, _)) = listener.accept().await else { return };
                    if refusing.load(Ordering::Acquire) {
                        continue;
                    }
                    accepted.fetch_add(1, Ordering::AcqRel);
                    let mut cuts = cut.subscribe();
                    let target = *target.lock().unwrap();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = forward(inbound, target) => {}
                            _ = cuts.changed() => {}
                        }
                    });
                }
            }
        });
        Self { address, target, cut, refusing, accepted, task }
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

    pub fn heal(&self) {
        self.refusing.store(false, Ordering::Release);
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

async fn forward(mut inbound: TcpStream, target: SocketAddr) {
    let Ok(mut outbound) = TcpStream::connect(target).await else { return };
    // Either may be gone already.
    let _ = (inbound.set_nodelay(true), outbound.set_nodelay(true));
    let _ = tokio::io::copy_bidirectional(&mut inbound, &mut outbound).await;
    let _ = outbound.shutdown().await;
}
