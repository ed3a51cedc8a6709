package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/interceptors"
)

// The built-in interceptors are conformant.
func TestBuiltinInterceptors(t *testing.T) {
	for _, f := range interceptors.Builtin() {
		t.Run(f.Name, func(t *testing.T) {
			r := conformance.Run(t, conformance.InterceptorOf(f, ""))
			for _, p := range r.Profiles {
				if p.Result == conformance.NonConformant {
					t.Errorf("%s is %s", p.Name, p.Result)
				}
			}
		})
	}
}
