"""The networks: one ``nn.Module`` a file, its config right above it."""
