"""Training programs: `moelora train CONFIG.yaml [key=value ...]`."""
