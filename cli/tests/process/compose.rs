//! The shipped topology, without a container engine: what `docker-compose.yml` says of three brokers is taken out of it
//! and run as three processes, each with the environment, the ports and the health check that are written there.

use crate::dev_cluster::until;
use crate::running::{FLOWSTONE, Running};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

#[derive(Deserialize)]
struct Compose {
    services: BTreeMap<String, Service>,
    volumes: BTreeMap<String, Option<serde_json::Value>>,
}

#[derive(Deserialize)]
struct Service {
    environment: BTreeMap<String, String>,
    ports: Vec<String>,
    volumes: Vec<String>,
    healthcheck: HealthCheck,
    restart: String,
}

#[derive(Deserialize)]
struct HealthCheck {
    test: Vec<String>,
}

/// Addresses here for host and port there.
#[derive(Default)]
struct Ports {
    by_place: BTreeMap<(String, String), SocketAddr>,
    /// Held until all are known, so that none is given out twice.
    held: Vec<TcpListener>,
}

impl Ports {
    fn of(&mut self, host: &str, port: &str) -> String {
        let held = &mut self.held;
        let here = self.by_place.entry((host.to_owned(), port.to_owned())).or_insert_with(|| {
            // On an address of its own, where the machine has more than one for itself: whoever connects to somebody before
            // a broker binds this port gets a port of 127.0.0.1.
            let listener = TcpListener::bind("127.0.0.2:0").or_else(|_| TcpListener::bind("127.0.0.1:0"));
            let listener = listener.expect("a port");
            let here = listener.local_addr().expect("its address");
            held.push(listener);
            here
        });
        here.to_string()
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

#[test]
fn the_compose_file_runs_as_three_processes() {
    let text = std::fs::read_to_string(root().join("docker-compose.yml")).expect("it is there");
    let compose: Compose = serde_saphyr::from_str(&text).expect("it is what compose files are");
    assert_eq!(compose.services.len(), 3);
    let shipped = root().join("packaging/broker.toml");
    let data_dir = std::fs::read_to_string(&shipped).expect("it is there");
    let data_dir = data_dir.lines().find_map(|line| line.strip_prefix("data_dir = ")).expect("a data_dir");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut ports = Ports::default();

    // Every address of the file, with its own port here.
    let mut environments: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    let mut servers = Vec::new();
    for (name, service) in &compose.services {
        let mut environment = BTreeMap::new();
        for (key, value) in &service.environment {
            let value = match key.as_str() {
                "FLOWSTONE_LISTEN__CLIENT" | "FLOWSTONE_LISTEN__PEER" | "FLOWSTONE_LISTEN__ADMIN" => {
                    let (host, port) = value.split_once(':').expect("host and port");
                    assert_eq!(host, "0.0.0.0", "other containers must reach it");
                    ports.of(name, port)
                }
                // Clients on the host are told the port that is published for them.
                "FLOWSTONE_ADVERTISE__CLIENT" => {
                    let (host, port) = value.split_once(':').expect("host and port");
                    assert_eq!(host, "localhost");
                    let published = service.ports.iter().find_map(|published| {
                        let rest = published.strip_prefix("127.0.0.1:").expect("published on this machine alone");
                        rest.split_once(':').filter(|(outside, _)| *outside == port).map(|(_, inside)| inside)
                    });
                    let address = ports.of(name, published.expect("the advertised port is published"));
                    servers.push(address.clone());
                    address
                }
                "FLOWSTONE_ADVERTISE__PEER" | "FLOWSTONE_CLUSTER__SEEDS" => {
                    let places = value.split(',').map(|place| {
                        let (host, port) = place.split_once(':').expect("host and port");
                        assert!(compose.services.contains_key(host), "{place} is no service");
                        ports.of(host, port)
                    });
                    places.collect::<Vec<_>>().join(",")
                }
                _ => value.clone(),
            };
            environment.insert(key.clone(), value);
        }
        environment.insert("FLOWSTONE_NODE__DATA_DIR".into(), folder.path().join(name).to_string_lossy().into_owned());
        environments.insert(name, environment);
        // What the broker keeps is on a volume, and comes back with the container.
        let (volume, target) = service.volumes[0].split_once(':').expect("volume and target");
        assert!(compose.volumes.contains_key(volume), "{volume} is not declared");
        assert_eq!(format!("{target:?}"), data_dir);
        assert_eq!(service.restart, "unless-stopped");
    }

    drop(ports.held);
    let command = |environment: &BTreeMap<String, String>, arguments: &[&str]| {
        let mut command = Command::new(FLOWSTONE);
        let arguments = arguments.iter().map(|argument| match *argument {
            "/etc/flowstone/broker.toml" => shipped.to_str().expect("text"),
            other => other,
        });
        command.args(arguments).envs(environment).env_remove("FLOWSTONE_SERVER");
        command
    };
    let brokers: Vec<Running> = environments
        .values()
        .map(|environment| {
            let mut broker =
                Running::spawn(command(environment, &["broker", "--config", "/etc/flowstone/broker.toml"]));
            let mut stderr = broker.child.stderr.take().expect("stderr is piped");
            // Read all the time: a broker that finds its stderr full would wait.
            std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
            broker
        })
        .collect();
    for (name, service) in &compose.services {
        let (kind, check) = service.healthcheck.test.split_first().expect("a check");
        let (program, check) = check.split_first().expect("a program");
        assert_eq!((kind.as_str(), program.as_str()), ("CMD", "flowstone"));
        let check: Vec<&str> = check.iter().map(String::as_str).collect();
        until("a broker to be ready", || {
            Running::spawn(command(&environments[name.as_str()], &check)).end().status.success()
        });
    }
    let servers = servers.join(",");
    let ask = |arguments: &[&str]| Running::start(&[arguments, &["--server", &servers]].concat());
    ask(&["topic", "create", "t", "-r", "3"]).end().ok();
    ask(&["produce", "t"]).with_input(b"one\ntwo\n").ok();
    assert_eq!(ask(&["consume", "t", "-e", "--rack", "b"]).end().text(), "one\ntwo\n");
    let brokers_told = ask(&["cluster", "info", "-o", "json"]).end().json();
    let racks: Vec<_> = brokers_told["brokers"].as_array().expect("a list").iter().map(|told| &told["rack"]).collect();
    assert_eq!(racks, ["a", "b", "c"]);
    // Once nobody is there, the check says so.
    drop(brokers);
    let (name, service) = compose.services.first_key_value().expect("a service");
    let check: Vec<&str> = service.healthcheck.test[2..].iter().map(String::as_str).collect();
    Running::spawn(command(&environments[name.as_str()], &check)).end().fails(4, &["running?"]);
}

#[test]
fn the_image_checks_its_health_as_the_compose_file_does() {
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).expect("it is there");
    let compose = std::fs::read_to_string(root().join("docker-compose.yml")).expect("it is there");
    let compose: Compose = serde_saphyr::from_str(&compose).expect("it is what compose files are");
    let check = compose.services["flowstone-1"].healthcheck.test[1..].iter().map(|word| format!("{word:?}"));
    let check = format!("CMD [{}]", check.collect::<Vec<_>>().join(", "));
    assert!(dockerfile.contains(&check), "{check}");
    // Not as root, and stopped as the broker expects.
    assert!(dockerfile.contains("\nUSER flowstone\n") && dockerfile.contains("\nSTOPSIGNAL SIGTERM\n"));
}

#[test]
fn the_shipped_configuration_is_valid() {
    let shipped = root().join("packaging/broker.toml");
    let mut command = Command::new(FLOWSTONE);
    command.args(["config", "check", "--config"]).arg(shipped);
    Running::spawn(command).end().ok();
}
