"""What a configuration will take: memory, time, cost."""
