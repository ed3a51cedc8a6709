package plugins

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/config"
)

// externals returns the programs by kind/name. The map is not changed.
func (h *Host) externals() map[string]External {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.external
}

// index checks a list of programs.
func (h *Host) index(list []External) (map[string]External, error) {
	byID := make(map[string]External, len(list))
	var errs []error
	for _, e := range list {
		id := e.Kind + "/" + e.Name
		known, err := h.compiledIn(e.Kind)
		_, twice := byID[id]
		switch {
		case err != nil:
			errs = append(errs, err)
		case twice || slices.Contains(known, e.Name):
			errs = append(errs, fmt.Errorf("%s is registered twice: by the program %s and by another", id, e.Path))
		case !validDigest(e.SHA256):
			errs = append(errs, fmt.Errorf("%s: the program %s has no valid SHA-256 (%q): pin the 64 hexadecimal digits that you trust", id, e.Path, e.SHA256))
		default:
			byID[id] = e
		}
	}
	return byID, errors.Join(errs...)
}

// checkExternal checks the choice of a program: the file against its pin, the
// options against what it has said of them.
func (h *Host) checkExternal(e External, spec core.PluginSpec) error {
	if !h.cfg.Idle {
		if err := verify(e.Path, e.SHA256); err != nil {
			return err
		}
	}
	if len(e.Describe.ConfigSchema) == 0 {
		return nil
	}
	return config.CheckOptions(spec.Options, spec.Origin, e.Describe.ConfigSchema)
}

// Refresh reads again which programs there are. Instances that exist keep
// theirs; new ones are of the new programs. An error changes nothing.
func (h *Host) Refresh(ctx context.Context) error {
	if h.cfg.Reread == nil {
		return nil
	}
	list, err := h.cfg.Reread(ctx)
	if err != nil {
		return fmt.Errorf("plugins: refresh: %w", err)
	}
	byID, err := h.index(list)
	if err != nil {
		return fmt.Errorf("plugins: refresh: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.external = byID
	return nil
}

// Revision tells the programs of a plugin apart: it is another one when Refresh
// has brought another program. It is empty for what is compiled in.
func (h *Host) Revision(kind, name string) string { return h.externals()[kind+"/"+name].SHA256 }
