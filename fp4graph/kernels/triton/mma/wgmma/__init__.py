"""The stream of fragments on Hopper's `wgmma`, for 17 to 512 rows of x."""
