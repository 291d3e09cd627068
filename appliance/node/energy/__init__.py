"""Energy: meters read, and what they counted given to the engines that worked."""
