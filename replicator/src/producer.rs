//! A client that appends records over the control connection.
