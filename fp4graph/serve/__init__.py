"""What serving engines will make of a checkpoint, by their own rules, before they are started."""
