{{- /* Written by hand. What the other templates include; numbers come from _constants.tpl, which is made. */ -}}

{{- define "hycluster.namespace" -}}
{{- $.Values.namespace.name | default $.Release.Namespace -}}
{{- end -}}

{{- define "hycluster.chart" -}}
{{- printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "hycluster.image" -}}
{{- $image := $.Values.image -}}
{{- printf "%s:%s" $image.repository $image.tag }}{{ with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "hycluster.pullSecrets" -}}
{{- range $.Values.imagePullSecrets }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{- /* Seconds that what is in work has, in whole ones. */ -}}
{{- define "hycluster.workSeconds" -}}
{{- $constants := include "hycluster.constants" $ | fromJson -}}
{{- ceil ($.Values.settings.drain_timeout_s | default $constants.drainTimeoutSeconds) | int64 -}}
{{- end -}}

{{- /* RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S of ingress and engines. */ -}}
{{- define "hycluster.drain" -}}
{{- add (include "hycluster.workSeconds" $) (int64 (include "hycluster.constants" $ | fromJson).drainMarginSeconds) -}}
{{- end -}}

{{- /* terminationGracePeriodSeconds of ingress and engines. */ -}}
{{- define "hycluster.grace" -}}
{{- $needed := add (include "hycluster.drain" $) (int64 (include "hycluster.constants" $ | fromJson).graceMarginSeconds) -}}
{{- $given := $.Values.terminationGracePeriodSeconds | default $needed | int64 -}}
{{- if lt $given $needed -}}
{{- fail (printf "terminationGracePeriodSeconds: %d is too short: settings.drain_timeout_s takes %d" $given $needed) -}}
{{- end -}}
{{- $given -}}
{{- end -}}

{{- /* rayClusterDeletionDelaySeconds: what the old cluster has in work may end there. */ -}}
{{- define "hycluster.deletionDelay" -}}
{{- add (include "hycluster.workSeconds" $) (int64 (include "hycluster.constants" $ | fromJson).deletionMarginSeconds) -}}
{{- end -}}

{{- define "hycluster.ingressReplicas" -}}
{{- ($.Values.settings.ingress | default dict).replicas | default (include "hycluster.constants" $ | fromJson).ingressReplicas | int -}}
{{- end -}}

{{- /* Whether ingress need an object store's credentials, and a way there; empty: no. */ -}}
{{- define "hycluster.remoteStore" -}}
{{- if hasPrefix "s3://" (($.Values.settings.batches | default dict).store | default "") }}true{{ end -}}
{{- end -}}

{{- /* The settings, fitted to the pods as `hycluster k8s render` does it, as Ray Serve takes them. */ -}}
{{- define "hycluster.serveConfig" -}}
{{- $constants := include "hycluster.constants" $ | fromJson -}}
{{- $fitted := deepCopy $.Values.settings -}}
{{- range $protocol := list "http" "grpc" -}}
{{- $_ := set $fitted $protocol (mergeOverwrite (deepCopy (get $fitted $protocol | default dict)) (get $constants.listen $protocol)) -}}
{{- end -}}
{{- $auth := $fitted.auth | default dict -}}
{{- if not (or $auth.enabled (hasKey $auth "open")) -}}
{{- $_ := set $fitted "auth" (mergeOverwrite (deepCopy $auth) $constants.openAuth) -}}
{{- end -}}
{{- with $fitted.data_plane -}}
{{- $_ := set $fitted "data_plane" (omit . "host") -}}
{{- end -}}
{{- $ingress := $fitted.ingress | default dict -}}
{{- $_ := set $ingress "replicas" (include "hycluster.ingressReplicas" $ | int) -}}
{{- $_ := set $ingress "resources" $constants.ingressResources -}}
{{- if not (hasKey $ingress "replicas_per_node") -}}
{{- $_ := set $ingress "replicas_per_node" $constants.ingressReplicasPerPod -}}
{{- end -}}
{{- $_ := set $fitted "ingress" $ingress -}}
{{- if not ($fitted.batches | default dict).store -}}
{{- $_ := set $fitted "batches" nil -}}
{{- else -}}
{{- $_ := set $fitted.batches "resources" $constants.batchesResources -}}
{{- end -}}
{{- if gt (len $fitted.models) 1 -}}
{{- range $model := $fitted.models -}}
{{- $hardware := $model.hardware | default dict -}}
{{- $own := dict (include "hycluster.slug" $model.name) $constants.share -}}
{{- $_ := set $model "hardware" (merge (dict "resources" (mergeOverwrite ($hardware.resources | default dict) $own)) $hardware) -}}
{{- end -}}
{{- end -}}
{{- range $key, $value := $fitted -}}
{{- if and (kindIs "map" $value) (not $value) -}}
{{- $_ := unset $fitted $key -}}
{{- end -}}
{{- end -}}
{{- $serve := $constants.serve -}}
{{- $_ := set (first $serve.applications) "args" $fitted -}}
{{- toYaml $serve -}}
{{- end -}}
