//! Arguments, configuration, telemetry, command, exit code.

use std::process::ExitCode;

use apbd::cli::{self, Cli, CliError};
use apbd::telemetry;
use clap::Parser;

fn main() -> ExitCode {
    #[cfg(feature = "cuda")]
    apbd::comm::nccl::leave_multicast_off();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => return cli::explain(&refusal),
    };
    let result = telemetry::init(&cli.log).map_err(CliError::from).and_then(|()| cli.command.execute());
    match result {
        Ok(status) => status.into(),
        Err(error) => {
            telemetry::console::line(&format!("apbd: {error}"));
            error.exit_code()
        }
    }
}
