"""What must not go into the model or come out of it: detectors, the policy over them, and the screen of a stream."""
