//! A whole broker on a port of the system's choice and a folder of its own, and clients that speak gRPC to it with the
//! generated code alone.

mod bad_input;
mod damage;
mod groups;
mod hostile;
mod http;
mod idempotence;
mod limits;
mod records;
mod reference;
mod stalled;
mod start_stop;
mod topics;
mod wire;
mod world;
