//! Server addresses as users write them: `HOST:PORT`, several separated by commas, IPv6 hosts in brackets.

use std::fmt;

use crate::error::{Error, ErrorCode, Result};

/// One `HOST:PORT`; IPv6 hosts keep their brackets.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ServerAddress(String);

impl ServerAddress {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::new(
                ErrorCode::InvalidRequest,
                format!("{text:?} is no server address: {why}; write HOST:PORT, such as 127.0.0.1:7070 or [::1]:7070"),
            ))
        };
        if text.contains("://") {
            return refuse("it has a scheme");
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | '@' | '?' | '#' | '%')) {
            return refuse("it has characters that no host or port has");
        }
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let Some((host, after)) = rest.split_once(']') else { return refuse("its bracket is not closed") };
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return refuse("what is in brackets is no IPv6 address");
            }
            let Some(port) = after.strip_prefix(':') else { return refuse("the port is missing") };
            (host, port)
        } else {
            let Some((host, port)) = text.rsplit_once(':') else { return refuse("the port is missing") };
            if host.contains(':') {
                return refuse("an IPv6 address needs brackets");
            }
            (host, port)
        };
        if host.is_empty() {
            return refuse("the host is missing");
        }
        match port.parse::<u16>() {
            Ok(0) | Err(_) => refuse("the port must be a number from 1 to 65535"),
            Ok(_) if !port.bytes().all(|digit| digit.is_ascii_digit()) => refuse("the port must be digits alone"),
            Ok(_) => Ok(Self(text.to_owned())),
        }
    }

    /// A list separated by commas; at least one, doubles dropped.
    pub(crate) fn parse_list(text: &str) -> Result<Vec<Self>> {
        let mut list = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let address = Self::parse(part)?;
            if !list.contains(&address) {
                list.push(address);
            }
        }
        if list.is_empty() {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                "no server address was given; write HOST:PORT, such as 127.0.0.1:7070",
            ));
        }
        Ok(list)
    }

    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.0)
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_addresses() {
        for text in ["localhost:7070", "127.0.0.1:1", "[::1]:65535", "broker-1.example.com:7070"] {
            assert_eq!(ServerAddress::parse(text).unwrap().to_string(), text);
        }
        let list = ServerAddress::parse_list("a:1, b:2 ,a:1,").unwrap();
        assert_eq!(list.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a:1", "b:2"]);
    }

    #[test]
    fn bad_addresses_say_why_and_what_to_write() {
        let rows = [
            ("localhost", "port is missing"),
            ("[::1]", "port is missing"),
            ("::1:7070", "brackets"),
            ("[::1:7070", "not closed"),
            ("[nonsense]:7070", "no IPv6 address"),
            (":7070", "host is missing"),
            ("h:0", "from 1 to 65535"),
            ("h:+1", "digits"),
            ("h:65536", "from 1 to 65535"),
            ("http://h:1", "scheme"),
            ("h:1/path", "characters"),
            ("u@h:1", "characters"),
        ];
        for (text, why) in rows {
            let message = ServerAddress::parse(text).unwrap_err().to_string();
            assert!(message.contains(why) && message.contains("HOST:PORT"), "{text}: {message}");
        }
        assert!(ServerAddress::parse_list(" , ").unwrap_err().to_string().contains("HOST:PORT"));
    }
}
