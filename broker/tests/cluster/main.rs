//! Several whole brokers in one process, on ports of the system's choice and folders of their own, and clients that speak
//! gRPC to them with the generated code alone.

mod controlling;
mod expiring;
mod forming;
mod groups;
mod operations;
mod recovering;
mod surviving;
mod transacting;
mod transactor;
mod upgrading;
mod world;
