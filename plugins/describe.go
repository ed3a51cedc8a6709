package plugins

import "github.com/longhouse-go/longhouse/plugins/internal/bridge"

// Description is what a plugin says of itself, as the program prints it when it
// is run with the argument "describe": one JSON object for each component.
type Description = bridge.Description
