//! The fleets of one benchmark: as many processes as the limit of open files asks for.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;

use super::fleet::{Order, Plan, Report};

/// The most devices a process.
const DEVICES_A_PROCESS: usize = 15_000;

/// Devices, online.
pub struct Herd {
    fleets: Vec<Fleet>,
    /// How long each login took, nanoseconds, sorted.
    pub logins: Vec<u64>,
}

struct Fleet {
    child: Child,
    orders: ChildStdin,
    reports: Lines<BufReader<ChildStdout>>,
}

impl Herd {
    /// Has all of the plan's devices log in, one process after the other. `program`: this one; `wrapper`: what runs it, if
    /// anything (`taskset -c 1`); `progress` is told how many are online.
    ///
    /// # Errors
    /// If a process cannot be started, or a device cannot log in.
    pub fn start(
        program: &Path,
        wrapper: &[String],
        plan: &Plan,
        mut progress: impl FnMut(usize),
    ) -> anyhow::Result<Self> {
        let mut herd = Self { fleets: Vec::new(), logins: Vec::new() };
        let mut first = 0;
        while first < plan.devices {
            let devices = DEVICES_A_PROCESS.min(plan.devices - first);
            let mut fleet = Fleet::spawn(program, wrapper)?;
            let part = Plan { first: plan.first + first, devices, ..plan.clone() };
            writeln!(fleet.orders, "{}", serde_json::to_string(&part)?)?;
            loop {
                match fleet.next()? {
                    Report::Progress(online) => progress(first + online),
                    Report::Online(logins) => {
                        herd.logins.extend(logins);
                        break;
                    }
                    _ => {}
                }
            }
            herd.fleets.push(fleet);
            first += devices;
            progress(first);
        }
        herd.logins.sort_unstable();
        Ok(herd)
    }

    /// Gives an order to all.
    ///
    /// # Errors
    /// If a process has ended.
    pub fn order(&mut self, order: Order) -> anyhow::Result<()> {
        for fleet in &mut self.fleets {
            writeln!(fleet.orders, "{}", serde_json::to_string(&order)?)?;
        }
        for fleet in &mut self.fleets {
            while !matches!(fleet.next()?, Report::Ready) {}
        }
        Ok(())
    }

    /// Waits until everyone has had what was expected: the first arrival of all, and each device's last, sorted; nanoseconds of
    /// the monotonic clock.
    ///
    /// # Errors
    /// If somebody does not get it, or is sent away.
    pub fn arrived(&mut self) -> anyhow::Result<(u64, Vec<u64>)> {
        let (mut first_of_all, mut all) = (u64::MAX, Vec::new());
        for fleet in &mut self.fleets {
            loop {
                if let Report::Arrived { first, last } = fleet.next()? {
                    first_of_all = first_of_all.min(first);
                    all.extend(last);
                    break;
                }
            }
        }
        all.sort_unstable();
        Ok((first_of_all, all))
    }

    /// The ids of the processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.fleets.iter().map(|fleet| fleet.child.id()).collect()
    }
}

impl Fleet {
    fn spawn(program: &Path, wrapper: &[String]) -> anyhow::Result<Self> {
        let mut words =
            wrapper.iter().map(String::as_str).chain([program.to_str().context("a strange path")?, "fleet"]);
        let first = words.next().context("no program")?;
        let mut child = Command::new(first)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{first} cannot be started"))?;
        let orders = child.stdin.take().context("no standard input")?;
        let reports = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        Ok(Self { child, orders, reports })
    }

    fn next(&mut self) -> anyhow::Result<Report> {
        let line = self.reports.next().context("the process with the devices has ended")??;
        match serde_json::from_str(&line)? {
            Report::Failed(why) => anyhow::bail!(why),
            report => Ok(report),
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Its devices leave with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
