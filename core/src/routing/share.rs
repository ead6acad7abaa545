//! How the traffic of a service is divided between clusters.

use super::{PlannedCluster, Preferences};

/// First each cluster takes its part, as far as it is trusted with it. What is left goes, in the order of preference,
/// to clusters that are trusted with more, then to those whose return is being held back, for they are healthy. What
/// nobody can carry overloads all in proportion.
pub(super) fn share_out(clusters: &mut [PlannedCluster], preferences: &Preferences) {
    let mut left = 1.0;
    let weights = clusters.iter().map(|cluster| u64::from(preferences.weight(&cluster.cluster))).sum::<u64>();
    if weights > 0 {
        for cluster in &mut *clusters {
            let part = f64::from(preferences.weight(&cluster.cluster)) / weights as f64;
            take(cluster, cluster.granted.min(part), &mut left);
        }
    }
    for cluster in &mut *clusters {
        take(cluster, cluster.granted, &mut left);
    }
    for cluster in &mut *clusters {
        take(cluster, cluster.possible, &mut left);
    }
    let taken: f64 = clusters.iter().map(|cluster| cluster.share).sum();
    if taken > 0.0 {
        clusters.iter_mut().for_each(|cluster| cluster.share /= taken);
    }
}

/// Raises a share up to `level`, as far as there is something left.
fn take(cluster: &mut PlannedCluster, level: f64, left: &mut f64) {
    let more = (level - cluster.share).min(*left).max(0.0);
    cluster.share += more;
    *left -= more;
}
