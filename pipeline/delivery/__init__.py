"""What leaves the house: bundle, device run, the SDK's pipeline, other runtimes."""
