//! The `stratascope` binary: parse, run, print an error once, map the result to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    native::cli::main()
}
