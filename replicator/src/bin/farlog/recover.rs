//! `farlog recover`: lets a node start again whose log contradicts its checkpoints.

use std::path::PathBuf;

use clap::Args;
use replicator::runtime::{NodeError, PartitionSalvage};

use crate::error::CliError;

/// Repair a partition that a node refuses to start with, giving up records
///
/// Use it if no other replica has the partition: where one has, move the partition's directory away and
/// let the node copy it. The node must not run. Without --yes, this says what would be lost and changes
/// nothing. With it, what follows the first fault is set aside in files beside the log (*.torn, *.aside),
/// the checkpoints are corrected, and the next start accepts that records are missing.
#[derive(Args)]
#[command(after_help = "\
Example:
  farlog recover --data-dir /var/lib/farlog --topic flights --partition 0")]
pub(crate) struct RecoverArgs {
    /// Directory of the segment files
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Topic
    #[arg(long, value_name = "NAME")]
    topic: String,
    /// Partition
    #[arg(long, value_name = "NUMBER")]
    partition: u32,
    /// Give up what is said to be lost
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &RecoverArgs) -> Result<(), CliError> {
    let failed = |error: NodeError| {
        let help = match &error {
            NodeError::InUse { .. } => "stop the node first",
            NodeError::Directory { .. } => {
                "--data-dir names the directory that has TOPIC-PARTITION directories in it"
            }
            _ => "`farlog dump` shows a segment",
        };
        CliError::new("cannot recover", error).help(help)
    };
    let plan =
        PartitionSalvage::plan(&args.data_dir, &args.topic, args.partition).map_err(failed)?;
    crate::print(&plan.to_string())?;
    if !args.yes {
        let what = format!("partition {} of topic {}", args.partition, args.topic);
        return Err(CliError::new(what, "nothing was changed")
            .help("to give up what is said above to be lost, run the same command with --yes"));
    }
    let end = plan.log_end_offset();
    plan.carry_out().map_err(failed)?;
    crate::print(&format!(
        "recovered: the files end at offset {end}; start the node\n"
    ))
}
