//! Which fault comes when: a list that follows from a seed.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::failure::Failure;

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultKind {
    /// SIGKILL, and a start later.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Pause,
    /// A broker that no other reaches, while clients do.
    Isolate,
    /// What a broker sends to others is held up; it hears them.
    Mute,
    /// What others send to a broker is held up; they hear it.
    Deaf,
    /// Two brokers do not reach each other, while the third reaches both.
    Bridge,
    /// A broker that clients do not reach, while others do.
    Clients,
    /// All that a broker sends and gets comes late.
    Delay,
    /// One packet in ten between a broker and the others must be sent again.
    Loss,
    /// SIGTERM, and a start at once.
    Restart,
    /// SIGKILL of all, and a start of all.
    KillAll,
    /// SIGKILL, its data gone, and a start.
    Wipe,
    /// One byte of a sealed segment changed.
    Rot,
}

impl FaultKind {
    /// All of them.
    pub const ALL: [FaultKind; 13] = [
        FaultKind::Kill,
        FaultKind::Pause,
        FaultKind::Isolate,
        FaultKind::Mute,
        FaultKind::Deaf,
        FaultKind::Bridge,
        FaultKind::Clients,
        FaultKind::Delay,
        FaultKind::Loss,
        FaultKind::Restart,
        FaultKind::KillAll,
        FaultKind::Wipe,
        FaultKind::Rot,
    ];

    /// Its name on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            FaultKind::Kill => "kill",
            FaultKind::Pause => "pause",
            FaultKind::Isolate => "isolate",
            FaultKind::Mute => "mute",
            FaultKind::Deaf => "deaf",
            FaultKind::Bridge => "bridge",
            FaultKind::Clients => "clients",
            FaultKind::Delay => "delay",
            FaultKind::Loss => "loss",
            FaultKind::Restart => "restart",
            FaultKind::KillAll => "kill-all",
            FaultKind::Wipe => "wipe",
            FaultKind::Rot => "rot",
        }
    }

    /// Whether it takes a cluster that is whole: with another copy gone already, a loss would be legal.
    pub const fn takes_a_copy(self) -> bool {
        matches!(self, FaultKind::Wipe | FaultKind::Rot)
    }

    /// How long it lasts at least and at most: beyond an election, and short enough for many in a minute.
    fn lasts(self) -> (Duration, Duration) {
        let (least, most) = match self {
            FaultKind::Restart | FaultKind::Wipe | FaultKind::Rot => (0, 0),
            FaultKind::Kill | FaultKind::KillAll => (0, 4_000),
            _ => (2_000, 6_000),
        };
        (Duration::from_millis(least), Duration::from_millis(most))
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for FaultKind {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        FaultKind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let names = FaultKind::ALL.map(FaultKind::as_str).join(", ");
            Failure::new(format!("`{text}` is no fault; there are {names}"))
        })
    }
}

/// A fault and whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// To which broker; of `Bridge`, the one that reaches both.
    pub broker: i32,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FaultKind::KillAll => self.kind.fmt(f),
            kind => write!(f, "{kind} broker {}", self.broker),
        }
    }
}

/// One fault of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// When it begins, from the run's beginning.
    pub at: Duration,
    /// What happens.
    pub fault: Fault,
    /// When it is healed, from its beginning.
    pub lasts: Duration,
}

/// Faults one after another, never two at a time, with time between them to heal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The faults, in order.
    pub steps: Vec<Step>,
}

/// Before the first fault, and after the last.
const CALM: Duration = Duration::from_secs(3);

impl Schedule {
    /// Faults of these kinds upon these brokers, for so long. The same seed gives the same faults; each kind comes once
    /// before any comes again, and so does each broker.
    pub fn new(seed: u64, length: Duration, brokers: &[i32], kinds: &[FaultKind]) -> Schedule {
        let mut random = StdRng::seed_from_u64(seed);
        let mut steps = Vec::new();
        let mut at = CALM;
        let (mut left, mut turns): (Vec<FaultKind>, Vec<i32>) = (Vec::new(), Vec::new());
        while !kinds.is_empty() && !brokers.is_empty() {
            if left.is_empty() {
                left = kinds.to_vec();
                left.shuffle(&mut random);
            }
            let Some(kind) = left.pop() else { break };
            let (least, most) = kind.lasts();
            let lasts = random.random_range(least..=most);
            if at + lasts + CALM > length {
                break;
            }
            if turns.is_empty() {
                turns = brokers.to_vec();
                turns.shuffle(&mut random);
            }
            let Some(broker) = turns.pop() else { break };
            steps.push(Step { at, fault: Fault { kind, broker }, lasts });
            at += lasts + random.random_range(Duration::from_millis(2_000)..Duration::from_millis(5_000));
        }
        Schedule { steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_schedule() {
        let schedule = |seed| Schedule::new(seed, Duration::from_secs(300), &[1, 2, 3], &FaultKind::ALL);
        assert_eq!(schedule(7), schedule(7));
        assert_ne!(schedule(7), schedule(8));
    }

    #[test]
    fn faults_do_not_meet_and_every_kind_comes() {
        let length = Duration::from_secs(300);
        for seed in 0..50 {
            let steps = Schedule::new(seed, length, &[1, 2, 3], &FaultKind::ALL).steps;
            for pair in steps.windows(2) {
                assert!(pair[0].at + pair[0].lasts < pair[1].at);
            }
            assert!(steps.iter().all(|step| step.at + step.lasts + CALM <= length));
            for kind in FaultKind::ALL {
                assert!(steps.iter().any(|step| step.fault.kind == kind), "seed {seed}: no {kind}");
            }
            for round in steps.chunks_exact(3) {
                let hit: std::collections::BTreeSet<i32> = round.iter().map(|step| step.fault.broker).collect();
                assert_eq!(hit.len(), 3, "seed {seed}: {round:?}");
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for kind in FaultKind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
        }
        let told = "flood".parse::<FaultKind>().expect_err("there is none").to_string();
        assert!(told.contains("flood") && told.contains("kill-all"), "{told}");
    }
}
