//! What a broker needs of the system and may not get: a port, a folder, room, file descriptors, time to stop.

use crate::daemon::{Daemon, Setup};
use crate::running::Running;
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn a_port_in_use() {
    let folder = folder();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("its address").to_string();
    Setup::new(&folder.path().join("data")).at(&taken).start_fails().fails(1, &["listen.client", &taken, "in use"]);
    let setup = Setup::new(&folder.path().join("data"));
    setup.set(&format!("listen.admin={taken}")).start_fails().fails(1, &["listen.admin", &taken]);
    let port = taken.rsplit(':').next().expect("a port");
    crate::running::flowstone(&["dev", "--port", port]).fails(1, &[&taken, "in use", "--port"]);
}

#[test]
fn a_data_directory_that_another_broker_has() {
    let folder = folder();
    let data = folder.path().join("data");
    let broker = Daemon::start(&data);
    Setup::new(&data).start_fails().fails(1, &[data.to_str().expect("text"), "in use by another"]);
    // The first one does not mind, and leaves it free when it dies.
    broker.run(&["topic", "create", "t"]).ok();
    broker.kill();
    Daemon::start(&data);
}

#[test]
fn a_data_directory_that_is_none() {
    let folder = folder();
    let file = folder.path().join("file");
    std::fs::write(&file, b"a file").expect("written");
    Setup::new(&file).start_fails().fails(1, &[file.to_str().expect("text")]);
    let below = file.join("data");
    crate::running::flowstone(&["dev", "--port", "0", "--data-dir", below.to_str().expect("text")])
        .fails(1, &[below.to_str().expect("text")]);
}

#[test]
fn a_data_directory_of_a_newer_format() {
    let folder = folder();
    let data = folder.path().join("data");
    Daemon::start(&data).stop();
    let manifest = data.join("manifest");
    let mut bytes = std::fs::read(&manifest).expect("every data directory has one");
    // Magic, then the version; a CRC over all closes the file.
    bytes[8..12].copy_from_slice(&99_u32.to_le_bytes());
    let covered = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..covered]);
    bytes[covered..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&manifest, bytes).expect("written");
    Setup::new(&data).start_fails().fails(1, &["99", "newer"]);
}

/// A file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// `None`, with a message, where this user may not mount.
    fn tmpfs(at: &Path, options: &str) -> Option<Mounted> {
        std::fs::create_dir_all(at).expect("a folder to mount on");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Mounted(at.to_owned())),
            Ok(output) => {
                eprintln!("skipped: cannot mount a tmpfs: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: cannot run mount: {error}");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status();
        assert!(status.expect("mount runs").success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_file_system_that_is_read_only() {
    let folder = folder();
    let Some(mounted) = Mounted::tmpfs(&folder.path().join("disk"), "size=64m") else { return };
    let data = mounted.0.join("data");
    // A new directory cannot be made there, and one that is there cannot be used.
    mounted.remount("ro");
    let config_beside = Setup::new(&folder.path().join("data")).set(&format!("node.data_dir={}", data.display()));
    config_beside.start_fails().fails(1, &[data.to_str().expect("text"), "ead-only"]);
    mounted.remount("rw");
    config_beside.start().stop();
    mounted.remount("ro");
    config_beside.start_fails().fails(1, &[data.to_str().expect("text"), "ead-only"]);
    mounted.remount("rw");
    config_beside.start();
}

#[test]
fn a_folder_that_may_not_be_written() {
    let folder = folder();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("ours");
    let closed = folder.path().join("closed");
    std::fs::create_dir(&closed).expect("made");
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555)).expect("ours");
    let data = closed.join("data");
    let setup = Setup::new(&folder.path().join("data")).set(&format!("node.data_dir={}", data.display()));
    let mut command = setup.command();
    if rustix::process::geteuid().is_root() {
        // Permissions mean nothing to root: nobody tries instead, where nobody may run the binary at all.
        command.uid(65_534).gid(65_534);
        let mut version = Command::new(crate::running::FLOWSTONE);
        if !version.arg("--version").uid(65_534).gid(65_534).output().is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: this is root, and nobody else may run {}", crate::running::FLOWSTONE);
            return;
        }
    }
    Running::spawn(command).end().fails(1, &[data.to_str().expect("text"), "ermission"]);
}

#[test]
fn a_full_disk_refuses_clearly_and_recovers_when_there_is_room() {
    let folder = folder();
    let Some(mounted) = Mounted::tmpfs(&folder.path().join("disk"), "size=96m") else { return };
    let data = mounted.0.join("data");
    let setup = Setup::new(&folder.path().join("data")).set(&format!("node.data_dir={}", data.display()));
    let broker = setup.start();
    // A file that takes room as the disk's other users do, to be removed later.
    std::fs::write(mounted.0.join("other"), vec![1; 24 << 20]).expect("there is room");
    broker.run(&["topic", "create", "t", "-c", "segment.bytes=8388608"]).ok();
    broker.feed(&["produce", "t"], b"before\n").ok();
    // Text that no codec or sparse file makes small, more than there is room for.
    let line = |number: usize| format!("{number:0999}\n");
    let many: String = (0..96 << 10).map(line).collect();
    let said = broker.feed(&["produce", "t", "--timeout", "3s"], many.as_bytes());
    let said = said.fails(4, &["not acknowledged", "the broker's disk"]);
    // Every line that it counts as acknowledged is there, in order, and nothing else but whole lines.
    let read = broker.run(&["consume", "t", "-e"]).text();
    let mut lines = read.split_inclusive('\n');
    assert_eq!(lines.next(), Some("before\n"));
    let whole = lines.clone().count();
    assert!(whole > 0 && lines.enumerate().all(|(number, text)| text == line(number)));
    let acknowledged: usize = said
        .lines()
        .find_map(|text| text.strip_prefix("produced ")?.split(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("a count of what was acknowledged: {said}"));
    assert!((1..=whole).contains(&acknowledged), "{acknowledged} acknowledged, {whole} there");
    // It still serves what needs no room, and says what is the matter.
    broker.run(&["topic", "describe", "t"]).ok();
    // Room, and it goes on by itself.
    std::fs::remove_file(mounted.0.join("other")).expect("there");
    broker.feed(&["produce", "t", "--timeout", "60s"], b"after\n").ok();
    assert!(broker.run(&["consume", "t", "--from", "-1", "-e"]).text() == "after\n");
    // Nothing crashed, and a restart finds it all.
    broker.kill();
    let broker = setup.start();
    assert_eq!(broker.run(&["consume", "t", "--from", "-1", "-e"]).text(), "after\n");
}

#[test]
fn sigterm_answers_what_was_taken_then_stops() {
    let folder = folder();
    let data = folder.path().join("data");
    let broker = Daemon::start(&data);
    broker.run(&["topic", "create", "t"]).ok();
    let mut produce = broker.begin(&["produce", "t", "-o", "json", "--timeout", "2s"]);
    let mut stdin = produce.child.stdin.take().expect("stdin is piped");
    let mut acknowledged = BufReader::new(produce.child.stdout.take().expect("stdout is piped")).lines();
    let feeding = std::thread::spawn(move || while stdin.write_all(&b"a line of some length\n".repeat(100)).is_ok() {});
    for _ in 0..1_000 {
        acknowledged.next().expect("acknowledgements come").expect("text");
    }
    // A reader that waits for more holds nothing up.
    let mut consume = broker.begin(&["consume", "t", "--timeout", "1s"]);
    let mut seen = BufReader::new(consume.child.stdout.take().expect("stdout is piped")).lines();
    seen.next().expect("a line").expect("text");
    let reading = std::thread::spawn(move || seen.map_while(Result::ok).count());
    let (status, messages) = broker.stop();
    assert!(status.success(), "{status}: {messages}");
    assert!(messages.contains("stopped"), "{messages}");
    let told = 1_000 + acknowledged.map_while(Result::ok).count();
    feeding.join().expect("feeding does not panic");
    drop(produce);
    drop(consume);
    reading.join().expect("reading does not panic");
    let broker = Daemon::start(&data);
    let there = broker.run(&["consume", "t", "-e"]).text().lines().count();
    assert!(there >= told, "{told} acknowledged, {there} there");
}

#[test]
fn a_second_signal_does_not_hang() {
    let folder = folder();
    let broker = Daemon::start(&folder.path().join("data"));
    broker.signal(Signal::INT);
    let (status, messages) = broker.stop();
    assert!(status.code().is_some(), "{status}: {messages}");
}

#[test]
fn no_file_descriptors_left() {
    let folder = folder();
    let data = folder.path().join("data");
    let broker = Setup::new(&data).open_files(120).start();
    broker.run(&["topic", "create", "t"]).ok();
    broker.feed(&["produce", "t"], b"before\n").ok();
    // More connections than it has descriptors: those that it cannot take wait, it does not end.
    let held: Vec<TcpStream> = (0..300).map_while(|_| TcpStream::connect(&broker.server).ok()).collect();
    assert!(held.len() > 120, "{}", held.len());
    drop(held);
    broker.feed(&["produce", "t", "--timeout", "60s"], b"after\n").ok();
    // More partitions than it has descriptors: told or served, but it does not end.
    let ended = broker.run(&["topic", "create", "many", "-p", "500", "--timeout", "60s"]);
    let code = ended.status.code();
    assert!(matches!(code, Some(0 | 1 | 4)), "{code:?}: {}", ended.stderr);
    assert_eq!(broker.run(&["consume", "t", "-e", "--timeout", "60s"]).text(), "before\nafter\n");
    drop(broker);
    // And with descriptors, all is there.
    let broker = Daemon::start(&data);
    assert_eq!(broker.run(&["consume", "t", "-e"]).text(), "before\nafter\n");
}
