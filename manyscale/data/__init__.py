"""Pictures in, batches out: reading (`images`), sets and their splits (`sources`), augmentation (`transforms`), batches (`loader`)."""
