"""What a training run will need and take, from its settings alone: memory, speed, time and cost. No torch, no Ray."""
