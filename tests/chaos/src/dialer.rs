//! Which process is at the other end of a local connection: all brokers are told one address of each other, so that a
//! proxy learns from the kernel who came.

use std::fs;
use std::net::SocketAddr;

/// The process that connected from `from` to `to`, both on this machine; `None` where it is none of these.
pub(crate) fn process_of(from: SocketAddr, to: SocketAddr, candidates: &[u32]) -> Option<u32> {
    let inode = inode_of(&fs::read_to_string("/proc/net/tcp").ok()?, from, to)?;
    let wanted = format!("socket:[{inode}]");
    candidates.iter().copied().find(|process| {
        let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
        files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str()))
    })
}

/// The socket's inode in the kernel's table of connections: its second and third columns are the addresses in
/// hexadecimal, the tenth is the inode.
fn inode_of(table: &str, from: SocketAddr, to: SocketAddr) -> Option<u64> {
    let (from, to) = (in_hexadecimal(from)?, in_hexadecimal(to)?);
    table.lines().skip(1).find_map(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let ours = *columns.get(1)? == from && *columns.get(2)? == to;
        let inode = columns.get(9)?.parse().ok()?;
        (ours && inode != 0).then_some(inode)
    })
}

/// As the kernel writes an address: the bytes of the IP as a number of this machine.
fn in_hexadecimal(address: SocketAddr) -> Option<String> {
    let SocketAddr::V4(address) = address else { return None };
    Some(format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn this_process_is_found_and_others_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = listener.local_addr().expect("an address");
        let dialed = TcpStream::connect(to).expect("it listens");
        let (_accepted, from) = listener.accept().expect("it was dialed");
        let me = std::process::id();
        assert_eq!(process_of(from, to, &[1, me]), Some(me));
        assert_eq!(process_of(from, to, &[]), None);
        drop(dialed);
    }
}
