//! Arguments, configuration, telemetry, command, exit code.

fn main() {}
