//! Clients of a cluster whose leaders move and whose brokers die, hang, and do not know.

mod support;
