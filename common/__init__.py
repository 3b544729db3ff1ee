"""What two or more stages share: encoders, benchmarks, the fused model, the run folder, pictures."""
