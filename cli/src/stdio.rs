//! Stdout as the commands that stream use it, and questions on the terminal.

use crate::failure::{Failure, Outcome};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io::{self, BufRead, IsTerminal, Write};
use tokio::sync::oneshot;

/// Ends when whoever reads stdout has gone, so that `consume | head -1` ends although nothing more is to be
/// printed. Never ends where stdout is a file.
pub(crate) async fn stdout_closed() {
    let (closed, is_closed) = oneshot::channel();
    // A thread, and not the runtime's own polling: that would make stdout non-blocking, for whoever shares it too. It
    // ends with the process.
    std::thread::spawn(move || {
        let stdout = io::stdout();
        // Nothing is asked for: that the other end has gone is told all the same, as an error or a hang-up.
        let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
        while let Err(Errno::INTR) = poll(&mut fds, None) {}
        let _ = closed.send(());
    });
    let _ = is_closed.await;
}

/// Says something to people, on stderr. That nobody listens is no reason to stop.
pub(crate) fn say(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{what}");
}

/// Asks before something is destroyed. Where nobody can be asked, the command itself is the answer.
///
/// # Errors
/// The answer was not yes.
pub(crate) fn confirm(question: &str, yes: bool) -> Outcome {
    if yes || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(());
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|error| Failure::failed(format!("cannot read: {error}")))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::failed("not done; answer y, or say --yes"))
    }
}
