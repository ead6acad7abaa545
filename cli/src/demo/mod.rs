//! `tombolo demo`: two clusters as real processes on loopback, and what happens when one loses its app.

pub mod app;
mod load;
mod screen;
mod script;

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::args::DemoOptions;
use screen::Screen;
use script::Script;

pub fn run(options: DemoOptions) -> anyhow::Result<()> {
    // One thread: the children's life is tied to the thread that started them.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let directory =
            tempfile::Builder::new().prefix("tombolo-demo-").tempdir().context("making a temporary directory")?;
        let mut script = Script::new(directory.path(), &options)?;
        let mut screen = Screen::new();
        let outcome = tokio::select! {
            outcome = script.run(&mut screen) => outcome,
            signal = interrupted() => Err(anyhow::anyhow!("stopped by {signal}")),
        };
        if outcome.is_ok() && !options.once {
            script.explain_by_hand(&screen);
            let signal = interrupted().await;
            screen.line(format!("\n{signal}: stopping everything"));
        }
        script.stop().await;
        if options.keep {
            screen.line(format!("\nkept: {}", directory.keep().display()));
        } else {
            directory.close().context("removing the temporary directory")?;
        }
        outcome
    })
}

/// Waits for Ctrl-C or a polite request to end.
async fn interrupted() -> Signal {
    use tokio::signal::unix::{SignalKind, signal};
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => Signal::SIGINT,
        _ = terminate.recv() => Signal::SIGTERM,
    }
}
