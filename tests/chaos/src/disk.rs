//! Faults of disks: too small, damaged.

use crate::failure::{Failure, Outcome};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A file system of a few megabytes, where this process may mount one; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts one over this folder, which is made.
    ///
    /// # Errors
    /// It is not allowed here: mounting takes root.
    pub fn mount(folder: &Path, megabytes: u32) -> Outcome<SmallDisk> {
        fs::create_dir_all(folder).map_err(Failure::of(folder.display()))?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "chaos"]).arg(folder))?;
        Ok(SmallDisk { folder: folder.to_owned() })
    }

    /// Gives it this size.
    ///
    /// # Errors
    /// More than that is in use.
    pub fn resize(&self, megabytes: u32) -> Outcome {
        run(Command::new("mount").args(["-o", &format!("remount,size={megabytes}m")]).arg(&self.folder))
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that ends may still have files of it open.
        let _ = run(Command::new("umount").arg("-l").arg(&self.folder));
    }
}

fn run(command: &mut Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().map_err(Failure::of(format!("{command:?}")))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// The segments below a data directory that are written no more: in each folder all but the newest, the oldest first.
///
/// # Errors
/// A folder cannot be read.
pub fn sealed_segments(data_dir: &Path) -> Outcome<Vec<PathBuf>> {
    Ok(segments(data_dir)?.0)
}

/// The segments below a data directory that are still written: in each folder the newest, those with the most content first.
///
/// # Errors
/// A folder cannot be read.
pub fn active_segments(data_dir: &Path) -> Outcome<Vec<PathBuf>> {
    let mut active = segments(data_dir)?.1;
    active.sort_by_key(|path| std::cmp::Reverse(content_of(path).map_or(0, |bytes| bytes.len())));
    Ok(active)
}

/// Those that are written no more, and those that are.
fn segments(data_dir: &Path) -> Outcome<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut sealed, mut active) = (Vec::new(), Vec::new());
    let mut folders = vec![data_dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut segments = Vec::new();
        for entry in fs::read_dir(&folder).map_err(Failure::of(folder.display()))? {
            let path = entry.map_err(Failure::of(folder.display()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log") {
                segments.push(path);
            }
        }
        segments.sort();
        active.extend(segments.pop());
        sealed.append(&mut segments);
    }
    sealed.sort();
    Ok((sealed, active))
}

/// A file without the zeros at its end.
fn content_of(path: &Path) -> Outcome<Vec<u8>> {
    let mut bytes = fs::read(path).map_err(Failure::of(path.display()))?;
    let content = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(content);
    Ok(bytes)
}

/// Overwrites the second half of a file's content with zeros, as a disk does that forgot what it had flushed.
///
/// # Errors
/// The file cannot be read or written, or holds nothing.
pub fn forget_tail(path: &Path) -> Outcome {
    let content = content_of(path)?.len();
    if content < 2 {
        return Err(Failure::new(format!("{}: there is no content to forget", path.display())));
    }
    let file = OpenOptions::new().write(true).open(path).map_err(Failure::of(path.display()))?;
    file.write_all_at(&vec![0; content - content / 2], (content / 2) as u64).map_err(Failure::of(path.display()))
}

/// Changes one byte in the middle of a file's content, as a rotten sector would; where. Zeros at its end are no content.
///
/// # Errors
/// The file cannot be read or written, or holds nothing.
pub fn flip_byte(path: &Path) -> Outcome<u64> {
    let bytes = content_of(path)?;
    if bytes.len() < 2 {
        return Err(Failure::new(format!("{}: there is no content to damage", path.display())));
    }
    let at = bytes.len() / 2;
    let file: File = OpenOptions::new().write(true).open(path).map_err(Failure::of(path.display()))?;
    file.write_all_at(&[bytes[at] ^ 0x10], at as u64).map_err(Failure::of(path.display()))?;
    Ok(at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_newest_segment_are_sealed() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, content) in [("a/00-01.log", "x"), ("a/05-06.log", "y"), ("a/09-10.log", "z"), ("b/00-01.log", "w")]
        {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, content).expect("written");
        }
        let sealed = sealed_segments(folder.path()).expect("read");
        let names: Vec<_> = sealed.iter().map(|path| path.strip_prefix(folder.path()).expect("below")).collect();
        assert_eq!(names, [Path::new("a/00-01.log"), Path::new("a/05-06.log")]);
    }

    #[test]
    fn one_byte_of_the_content_is_flipped() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, b"content\0\0\0\0\0\0").expect("written");
        let at = flip_byte(&path).expect("flipped") as usize;
        let now = fs::read(&path).expect("read");
        assert!(at < 7 && now.len() == 13);
        let changed: Vec<usize> = b"content\0\0\0\0\0\0"
            .iter()
            .zip(&now)
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(at, _)| at)
            .collect();
        assert_eq!(changed, [at]);
    }
}
