"""The operations: each module holds the fast plain-torch version, the registered operator and the public function."""
