//! What the demo lays out before its processes start: directories and the cluster file.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use crate::error::CliError;

/// The topic of the demo.
pub(crate) const TOPIC: &str = "demo";
/// Images that each partition of a node may have at a time: the current, the next, one being drained.
const IMAGES_PER_PARTITION: u64 = 3;
const IMAGE_SIZES: [u64; 4] = [8 << 20, 4 << 20, 2 << 20, 1 << 20];

/// Where everything of one demo is.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) data_dir: PathBuf,
    /// Log memory of all nodes, on tmpfs; removed when the demo ends.
    pub(crate) shm_dir: PathBuf,
    pub(crate) cluster_file: PathBuf,
    pub(crate) nodes: u32,
}

impl Layout {
    /// Makes the directories and writes a cluster file of `nodes` nodes on free ports, the first of
    /// which leads all partitions.
    pub(crate) fn create(
        data_dir: Option<&Path>,
        nodes: u32,
        partitions: u32,
        device: &str,
    ) -> Result<Self, CliError> {
        let data_dir = create_data_dir(data_dir)?;
        let shm_dir = PathBuf::from(format!("/dev/shm/farlog-demo-{}", std::process::id()));
        let image_size = image_size(u64::from(nodes) * u64::from(partitions))?;
        let text = cluster_text(nodes, partitions, device, image_size)?;
        let cluster_file = data_dir.join("cluster.toml");
        fs::write(&cluster_file, text).map_err(|error| {
            CliError::new(format!("cannot write {}", cluster_file.display()), error)
        })?;
        Ok(Self {
            data_dir,
            shm_dir,
            cluster_file,
            nodes,
        })
    }

    pub(crate) fn node_dir(&self, node: u32) -> PathBuf {
        self.data_dir.join(format!("node-{node}"))
    }

    /// The segment files that node `node` wrote.
    pub(crate) fn segments(&self, node: u32) -> Vec<String> {
        let mut segments = Vec::new();
        for partition in fs::read_dir(self.node_dir(node))
            .into_iter()
            .flatten()
            .flatten()
        {
            for file in fs::read_dir(partition.path())
                .into_iter()
                .flatten()
                .flatten()
            {
                if file
                    .path()
                    .extension()
                    .is_some_and(|extension| extension == "log")
                {
                    segments.push(file.path().display().to_string());
                }
            }
        }
        segments.sort();
        segments
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // Shared memory would stay occupied; the segment files hold the same records.
        if let Err(error) = fs::remove_dir_all(&self.shm_dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %self.shm_dir.display(), %error, "log memory was not removed");
        }
    }
}

fn create_data_dir(data_dir: Option<&Path>) -> Result<PathBuf, CliError> {
    let default = || std::env::temp_dir().join(format!("farlog-demo-{}", std::process::id()));
    let data_dir = data_dir.map_or_else(default, Path::to_path_buf);
    let failed = |error| {
        CliError::new(
            format!("cannot use data directory {}", data_dir.display()),
            error,
        )
        .help("name a directory that can be created or written with --data-dir")
    };
    fs::create_dir_all(&data_dir).map_err(failed)?;
    if fs::read_dir(&data_dir).map_err(failed)?.next().is_some() {
        let what = format!("data directory {}", data_dir.display());
        return Err(CliError::new(what, "it is not empty").help(
            "the demo compares a whole log with its input: name a new or an empty directory",
        ));
    }
    data_dir.canonicalize().map_err(failed)
}

/// The largest image size for which shared memory has room.
fn image_size(partition_replicas: u64) -> Result<u64, CliError> {
    let stat = rustix::fs::statvfs("/dev/shm").map_err(|error| {
        CliError::new("cannot use shared memory in /dev/shm", error)
            .help("mount a tmpfs on /dev/shm")
    })?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    let need = |size: u64| partition_replicas * IMAGES_PER_PARTITION * size;
    IMAGE_SIZES.into_iter().find(|&size| need(size) <= available).ok_or_else(|| {
        let least = need(IMAGE_SIZES[IMAGE_SIZES.len() - 1]) >> 20;
        CliError::new("no room in shared memory", format!("/dev/shm has {} MiB left, the demo needs {least}", available >> 20))
            .help("enlarge it (mount -o remount,size=1G /dev/shm; docker run --shm-size=1g), or choose fewer --partitions or --followers")
    })
}

fn cluster_text(
    nodes: u32,
    partitions: u32,
    device: &str,
    image_size: u64,
) -> Result<String, CliError> {
    let mut text = "# Written by `farlog demo`: node 1 leads, the others follow.\n".to_owned();
    // All ports are held until all are chosen, so that none is given twice.
    let mut held = Vec::new();
    for node in 1..=nodes {
        let failed = |error| CliError::new("cannot find a free port on 127.0.0.1", error);
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        text +=
            &format!("\n[[nodes]]\nid = {node}\naddress = \"{address}\"\ndevice = \"{device}\"\n");
        held.push(listener);
    }
    let replicas: Vec<_> = (1..=nodes).map(|node| node.to_string()).collect();
    text += &format!(
        "\n[[topics]]\nname = \"{TOPIC}\"\npartitions = {partitions}\nreplicas = [{}]\nimage_size = {image_size}\n",
        replicas.join(", ")
    );
    Ok(text)
}

#[cfg(test)]
mod tests {
    use replicator::cluster::Cluster;

    use super::*;

    #[test]
    fn the_cluster_file_is_valid_and_ports_differ() {
        let text = cluster_text(3, 5, "soft", 1 << 20).unwrap();
        let cluster = Cluster::parse(&text, Path::new("cluster.toml")).unwrap();
        assert_eq!(cluster.nodes().len(), 3);
        let topic = cluster.topic(TOPIC).unwrap();
        assert_eq!(
            (topic.partition_count(), topic.replicas_of(4)),
            (5, &[1, 2, 3][..])
        );
    }

    #[test]
    fn a_directory_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(create_data_dir(Some(dir.path())).is_ok());
        fs::write(dir.path().join("something"), "").unwrap();
        assert!(create_data_dir(Some(dir.path())).is_err());
    }
}
