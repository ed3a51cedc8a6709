package conformance

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The profiles.
const (
	ProfileChannel     = "channel"
	ProfileMembership  = "membership"
	ProfileInterceptor = "interceptor"
	ProfilePlugin      = "plugin"
	ProfileWire        = "wire"
	ProfileValve       = "valve"
	ProfileManager     = "manager"
	ProfileDeployer    = "deployer"
	ProfileStore       = "store"
)

// Registry is an ordered set of checks.
type Registry struct{ checks []Check }

// NewRegistry returns a registry of the given checks. A check that lacks
// something, and two checks of one id, are errors.
func NewRegistry(checks ...Check) (*Registry, error) {
	var errs []error
	seen := map[string]bool{}
	for _, c := range checks {
		switch {
		case c.Profile == "" || !strings.HasPrefix(c.ID, c.Profile+"/"):
			errs = append(errs, fmt.Errorf("check %q: its id must begin with its profile %q and a slash", c.ID, c.Profile))
		case seen[c.ID]:
			errs = append(errs, fmt.Errorf("check %q is there twice", c.ID))
		case c.Requirement == "" || c.Source == "" || c.Run == nil || c.Level == 0:
			errs = append(errs, fmt.Errorf("check %q: level, requirement, source and code are required", c.ID))
		case len(c.Saboteurs) == 0:
			errs = append(errs, fmt.Errorf("check %q has no saboteur: nobody knows whether it can fail", c.ID))
		}
		seen[c.ID] = true
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("conformance: %w", err)
	}
	return &Registry{slices.Clone(checks)}, nil
}

// Builtin returns the suite: all checks of all profiles.
func Builtin() *Registry {
	r, err := NewRegistry(slices.Concat(
		channelChecks(),
		membershipChecks(),
		interceptorChecks(),
		pluginChecks(),
		wireChecks(),
		valveChecks(),
		managerChecks(),
		deployerChecks(),
		storeChecks(),
	)...)
	if err != nil {
		panic(err) // a mistake in this package; a test makes the registry
	}
	return r
}

// Checks returns all checks in order.
func (r *Registry) Checks() []Check { return slices.Clone(r.checks) }

// Get returns the check of that id.
func (r *Registry) Get(id string) (Check, bool) {
	i := slices.IndexFunc(r.checks, func(c Check) bool { return c.ID == id })
	if i < 0 {
		return Check{}, false
	}
	return r.checks[i], true
}

// Profile returns the checks of a profile in order.
func (r *Registry) Profile(name string) []Check {
	var list []Check
	for _, c := range r.checks {
		if c.Profile == name {
			list = append(list, c)
		}
	}
	return list
}

// Profiles returns the names of all profiles, in order.
func (r *Registry) Profiles() []string {
	var list []string
	for _, c := range r.checks {
		if !slices.Contains(list, c.Profile) {
			list = append(list, c.Profile)
		}
	}
	return list
}

// Features returns all features that checks of a profile ask for, sorted.
func (r *Registry) Features(profile string) []string {
	var list []string
	for _, c := range r.checks {
		if c.Profile == profile {
			list = append(list, c.Features...)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}
