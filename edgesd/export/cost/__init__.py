"""What a network costs on a machine: memory, time, bytes."""
