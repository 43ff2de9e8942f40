//! The network between brokers, and between clients and brokers: late, lost, twice, out of order, cut.

use std::collections::BTreeMap;
use std::time::Duration;

use super::random::Random;

/// Who sends or receives: brokers by their place in the cluster, and all clients together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    /// A broker.
    Broker(usize),
    /// The clients.
    Clients,
}

/// How bad the network is when nothing is cut.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    pub(crate) delay_micros: (u64, u64),
    pub(crate) lost_permille: u64,
    pub(crate) twice_permille: u64,
    /// Messages of one pair may overtake each other.
    pub(crate) reorders: bool,
    /// This many in a thousand come minutes late.
    pub(crate) very_late_permille: u64,
}

impl Weather {
    pub(crate) const CALM: Self =
        Self { delay_micros: (50, 300), lost_permille: 0, twice_permille: 0, reorders: false, very_late_permille: 0 };

    pub(crate) fn drawn(random: &mut Random) -> Self {
        let mut weather = Self::CALM;
        if random.one_in(2) {
            weather.delay_micros.1 = [500, 2_000, 20_000, 80_000][random.index(4)];
        }
        if random.one_in(3) {
            weather.lost_permille = [1, 10, 100][random.index(3)];
        }
        if random.one_in(3) {
            weather.twice_permille = [5, 50][random.index(2)];
        }
        weather.reorders = random.one_in(3);
        if random.one_in(4) {
            weather.very_late_permille = 3;
        }
        weather
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Network {
    random: Random,
    pub(crate) weather: Weather,
    cut: BTreeMap<(Node, Node), u32>,
    last_delivery: BTreeMap<(Node, Node), Duration>,
}

impl Network {
    pub(crate) fn new(random: Random, weather: Weather) -> Self {
        Self { random, weather, cut: BTreeMap::new(), last_delivery: BTreeMap::new() }
    }

    /// Cuts one direction; cuts add up.
    pub(crate) fn cut(&mut self, from: Node, to: Node) {
        *self.cut.entry((from, to)).or_default() += 1;
    }

    /// Takes one cut back.
    pub(crate) fn mend(&mut self, from: Node, to: Node) {
        if let Some(cuts) = self.cut.get_mut(&(from, to)) {
            *cuts -= 1;
            if *cuts == 0 {
                self.cut.remove(&(from, to));
            }
        }
    }

    pub(crate) fn heal(&mut self) {
        self.cut.clear();
        self.weather = Weather::CALM;
    }

    pub(crate) fn is_cut(&self, from: Node, to: Node) -> bool {
        self.cut.contains_key(&(from, to))
    }

    /// When what is sent now arrives: never, once, or twice.
    pub(crate) fn deliveries(&mut self, from: Node, to: Node, now: Duration) -> Deliveries {
        if self.is_cut(from, to) || self.random.permille(self.weather.lost_permille) {
            return Deliveries([None, None]);
        }
        let first = self.delivery(from, to, now);
        let second = self.random.permille(self.weather.twice_permille).then(|| self.delivery(from, to, now));
        Deliveries([Some(first), second])
    }

    fn delivery(&mut self, from: Node, to: Node, now: Duration) -> Duration {
        let (least, most) = self.weather.delay_micros;
        if self.random.permille(self.weather.very_late_permille) {
            return now + self.random.millis(1_000, 20_000);
        }
        let mut at = now + self.random.micros(least, most);
        if !self.weather.reorders {
            let last = self.last_delivery.entry((from, to)).or_default();
            at = at.max(*last + Duration::from_nanos(1));
            *last = at;
        }
        at
    }
}

/// See [`Network::deliveries`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deliveries([Option<Duration>; 2]);

impl Deliveries {
    pub(crate) fn once(self) -> Option<Duration> {
        self.0[0]
    }

    pub(crate) fn all(self) -> impl Iterator<Item = Duration> {
        self.0.into_iter().flatten()
    }
}
