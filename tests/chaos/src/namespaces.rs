//! Networks of their own for processes: what one sends can be thrown away while what it is sent arrives.

use crate::failure::{Failure, Outcome};
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Tells those of one process apart.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Network namespaces around one switch, one for each broker and one for clients, where this process may make some. They
/// are removed when this is dropped; nothing of the machine's own network is touched.
#[derive(Debug)]
pub struct Namespaces {
    /// Of the switch and the clients; those of brokers have `-1`, `-2` and so on behind it.
    name: String,
    brokers: u8,
}

impl Namespaces {
    /// Makes them for brokers 1 to `brokers`.
    ///
    /// # Errors
    /// It is not allowed here: it takes root and `ip`.
    pub fn new(brokers: u8) -> Outcome<Namespaces> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("fs{}-{count}", std::process::id());
        ip(&["netns", "add", &name])?;
        // From here on all of it is removed, whatever fails.
        let namespaces = Namespaces { name, brokers };
        namespaces.wire()?;
        Ok(namespaces)
    }

    fn wire(&self) -> Outcome {
        let switch = self.name.as_str();
        ip(&["-n", switch, "link", "set", "lo", "up"])?;
        ip(&["-n", switch, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", switch, "addr", "add", "10.213.0.254/24", "dev", "switch"])?;
        ip(&["-n", switch, "link", "set", "switch", "up"])?;
        for broker in 1..=self.brokers {
            let (name, port) = (self.of(broker), format!("port{broker}"));
            ip(&["netns", "add", &name])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-n", switch, "link", "set", &port, "master", "switch", "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("{}/24", self.address(broker)), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    fn of(&self, broker: u8) -> String {
        format!("{}-{broker}", self.name)
    }

    /// Where a broker is.
    pub fn address(&self, broker: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, 0, broker)
    }

    /// A program that runs as this broker. It takes the place of `ip`: its process id is the child's.
    pub fn broker(&self, broker: u8, program: impl AsRef<OsStr>) -> Command {
        within(&self.of(broker), program)
    }

    /// A program that runs as a client.
    pub fn client(&self, program: impl AsRef<OsStr>) -> Command {
        within(&self.name, program)
    }

    /// Throws away whatever one broker sends to another; what that one sends arrives.
    ///
    /// # Errors
    /// It is so already.
    pub fn cut_one_way(&self, from: u8, to: u8) -> Outcome {
        let to = format!("{}/32", self.address(to));
        ip(&["-n", &self.of(from), "route", "add", "blackhole", &to])
    }

    /// Takes a cut back.
    ///
    /// # Errors
    /// There is none.
    pub fn mend(&self, from: u8, to: u8) -> Outcome {
        let to = format!("{}/32", self.address(to));
        ip(&["-n", &self.of(from), "route", "del", "blackhole", &to])
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for broker in 1..=self.brokers {
            let _ = ip(&["netns", "del", &self.of(broker)]);
        }
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn within(namespace: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program).env_remove("FLOWSTONE_SERVER");
    command
}

fn ip(arguments: &[&str]) -> Outcome {
    let told = || format!("ip {}", arguments.join(" "));
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().map_err(Failure::of(told()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("{}: {}", told(), String::from_utf8_lossy(&output.stderr).trim())))
    }
}
