package core

import "context"

// Deployer brings application bundles to this node.
type Deployer interface {
	// Start begins to watch; it returns before anything is deployed. What was
	// already applied before a restart may be applied again.
	Start(ctx context.Context, host DeployerHost) error
	// Status lists what the deployer knows.
	Status(ctx context.Context) ([]Deployment, error)
	// Stop ends watching; what is deployed keeps running. It works twice and
	// without Start.
	Stop(ctx context.Context) error
}

// DeployerHost is the node, as a deployer sees it. Calls come one at a time.
type DeployerHost interface {
	// Apply puts the bundle into service in place of an earlier one of the
	// same host and path. It returns when the new one serves; on an error the
	// earlier one goes on serving.
	Apply(ctx context.Context, b Bundle) error
	// Remove takes the context out of service.
	Remove(ctx context.Context, host, path string) error
}

// Bundle is an application, verified and unpacked.
type Bundle struct {
	// Host is the virtual host; empty means the default host.
	Host string `json:"host,omitempty"`
	// Path is the context path: "" for the root, or "/shop".
	Path string `json:"path"`
	// Version is free text, from the file name (shop##2.war) or the digest.
	Version string `json:"version"`
	// Digest is the SHA-256 of the archive, hexadecimal.
	Digest string `json:"digest"`
	// Dir holds the unpacked files. The host reads it and never writes; the
	// deployer removes it some time after a successor has been applied.
	Dir string `json:"dir"`
}

// Deployment is the state of one bundle.
type Deployment struct {
	Bundle
	// State is "staged", "serving", "failed" or "removed".
	State string `json:"state"`
	// Error is why the latest attempt failed, or empty.
	Error string `json:"error,omitempty"`
}
