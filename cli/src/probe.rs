//! Asks a broker's admin listener whether it is ready: what a container's health check and `dev -n` need, without a
//! program beside this one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Far above what an answer takes.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// What the broker said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// Whether it is ready.
    pub(crate) ready: bool,
    /// Why not, in its words.
    pub(crate) reasons: String,
}

/// `GET /readyz`.
///
/// # Errors
/// Nobody listens there, or says nothing that is HTTP, within the timeout.
pub(crate) async fn readiness(admin: &str, timeout: Duration) -> io::Result<Readiness> {
    let asked = async {
        let address = reachable(tokio::net::lookup_host(admin).await?.next().ok_or(io::ErrorKind::NotFound)?);
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET /readyz HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
        parse(&String::from_utf8_lossy(&answer))
            .ok_or_else(|| io::Error::other("what listens there does not speak HTTP"))
    };
    tokio::time::timeout(timeout, asked).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Who listens on every address is reached on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, address.port())
}

fn parse(answer: &str) -> Option<Readiness> {
    let status = answer.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Some(Readiness { ready: status == "200", reasons: body.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let rows = [
            ("HTTP/1.1 200 OK\r\nA: b\r\n\r\nok\n", Some((true, "ok"))),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\nit starts\n", Some((false, "it starts"))),
            ("HTTP/1.1 200 OK", Some((true, ""))),
            ("PRI * HTTP/2.0", None),
            ("", None),
        ];
        for (answer, expected) in rows {
            let expected = expected.map(|(ready, reasons)| Readiness { ready, reasons: reasons.to_owned() });
            assert_eq!(parse(answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn who_listens_everywhere_is_reached_on_loopback() {
        for (listen, reached) in [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:2", "[::1]:2"), ("10.1.2.3:4", "10.1.2.3:4")] {
            assert_eq!(reachable(listen.parse().expect("an address")).to_string(), reached);
        }
    }
}
