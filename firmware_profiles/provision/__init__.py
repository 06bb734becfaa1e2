"""What a blank board gets: first-boot files, wheelhouse, installer, service."""
