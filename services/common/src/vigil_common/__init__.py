"""What every Vigil service shares: errors, settings, logs, metrics, gRPC plumbing, streams and stores."""
