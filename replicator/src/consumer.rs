//! Fetching committed records by RDMA READ.
